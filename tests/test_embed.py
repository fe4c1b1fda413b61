"""The driver's part: pipelines that fail are begun again with what is missing."""

import threading
from pathlib import Path

import pytest

import bertray
from bertray import audit, embed
from bertray.errors import ClusterError
from bertray.store import Store


@pytest.fixture
def spec(tiny, tmp_path, rows_file):
    """60 rows in 20 units."""
    return {
        "data": {"train": rows_file([{"text": f"text number {i}", "label": i % 2} for i in range(60)]), "unit_rows": 3},
        "encoder": {"model": str(tiny), "pooling": "mean"},
        "output": str(tmp_path / "run"),
    }


def fail_after(monkeypatch, receipts, times):
    """Ray fails after so many receipts, so many times. Returns what each pipeline was given to do."""
    from ray.exceptions import RayError

    begun, real = [], embed._receipts

    def failing(todo, *rest):
        begun.append(len(todo))
        for number, item in enumerate(real(todo, *rest)):
            if number == receipts and len(begun) <= times:
                raise RayError("the nodes are gone")
            yield item

    monkeypatch.setattr(embed, "_receipts", failing)
    return begun


def test_a_pipeline_that_fails_is_begun_again_with_what_is_missing(spec, ray_cluster, monkeypatch, caplog):
    begun = fail_after(monkeypatch, 4, 1)
    assert bertray.run(spec, until="embed")["rows"]["train"]["rows"] == 60
    assert begun[0] == 20
    assert len(begun) == 2
    assert begun[1] <= 16
    assert f"embedding: begun again with {begun[1]} units that are missing: the nodes are gone" in caplog.text
    assert audit.verify(spec["output"])["ok"]
    assert not embed._pipelines()


def test_a_pipeline_that_fails_at_once_each_time_is_given_up(spec, ray_cluster, monkeypatch):
    def failing(*_):
        from ray.exceptions import RayError

        raise RayError("the nodes are gone\nin two lines")
        yield

    monkeypatch.setattr(embed, "_receipts", failing)
    with pytest.raises(ClusterError, match="has failed 3 times in a row: the nodes are gone in two lines") as caught:
        bertray.run(spec, until="embed")
    assert "\n" not in str(caught.value)


def test_what_is_looked_after_meanwhile_can_stop_the_waiting():
    waiting = threading.Event()

    def items():
        yield 1
        waiting.wait(30)
        yield 2

    def meanwhile():
        if found:
            raise ClusterError("enough")

    found = []
    with pytest.raises(ClusterError, match="enough"):
        for item in embed._aside(items(), meanwhile):
            found.append(item)
    waiting.set()
    assert found == [1]


def test_units_are_blocks_by_themselves_until_they_are_too_many():
    assert [*embed._blocks(10_000, 1)] == [slice(i, i + 1) for i in range(10_000)]
    cuts = [*embed._blocks(500_000, 1_000)]
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
    assert cuts[-1].stop == 500_000
    sizes = [cut.stop - cut.start for cut in cuts]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (50, 1)
    assert len(cuts) < 25_000


def test_receipts_are_noted_for_those_who_go_on(spec, ray_cluster, monkeypatch):
    monkeypatch.setattr(embed, "_NOTED", 8)
    bertray.run(spec, until="embed")
    (shards,) = Path(spec["output"]).glob("stores/*/shards")
    store, keys = Store(str(shards.parent)), [shard.stem for shard in shards.iterdir()]
    assert len([*(shards.parent / "receipts").iterdir()]) == 2
    assert len(store._noted()) == 16
    assert store.done(keys) == {receipt.unit: receipt for receipt in store.manifest().units}
    min(shards.iterdir()).unlink()
    (shards.parent / "manifest.json").unlink()
    bertray.run(spec, until="embed")
    assert audit.verify(spec["output"])["ok"]


def test_several_units_a_block_give_the_same_store(spec, ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setattr(embed, "_BLOCKS", 6)
    assert bertray.run(spec, until="embed")["rows"]["train"]["rows"] == 60
    verified = audit.verify(spec["output"])
    assert verified["ok"]
    assert verified["stores"][0]["shards"] == 20
