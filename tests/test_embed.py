"""The actor alone, called as Ray Data calls it: several units at once."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.checkpoints import find
from bertray.embed import Job, UnitEncoder
from bertray.sources import Columns, units
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Source
from bertray.store import Receipt, Store, with_vectors

COLUMNS = Columns("text", label="label")


@pytest.fixture
def cut(rows_file):
    """60 rows in 20 units; the text of row 31 is too long."""
    rows = [{"text": f"text number {i} " * (40 if i == 31 else 1), "label": i % 2} for i in range(60)]
    return units(Source(path=rows_file(rows)), COLUMNS, 3)


def actor(tiny, store, **spec):
    checkpoint = find(str(tiny))
    encoder = EncoderSpec(model=str(tiny), pooling="mean", max_length=64, precision="fp32", **spec)
    job = Job(checkpoint.name, "main", checkpoint.identity, encoder, (), {"a": COLUMNS}, {"a": store}, with_vectors)
    return UnitEncoder(job, "cpu", 2)


def answers(encoder, cut, at_once):
    def call(unit):
        (answer,) = encoder(pa.Table.from_pylist([{"split": "a", **asdict(unit)}])).to_pylist()
        return answer

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(call, cut))


def test_units_at_once_give_what_one_after_another_gives(tiny, tmp_path, cut):
    alone, together = Store(str(tmp_path / "alone")), Store(str(tmp_path / "together"))
    expected = answers(actor(tiny, alone), cut, 1)
    for given, answer in zip(answers(actor(tiny, together), cut, 3), expected, strict=True):
        assert not given["error"]
        ours, theirs = ({**json.loads(a["value"]), "seconds": 0} for a in (given, answer))
        assert ours == theirs
    for unit in cut:
        assert pq.read_table(together.shard(unit.key).path).equals(pq.read_table(alone.shard(unit.key).path))


def test_a_unit_that_fails_leaves_no_shard_and_the_others_theirs(tiny, tmp_path, cut):
    store = Store(str(tmp_path / "store"))
    given = answers(actor(tiny, store, truncation="error"), cut, 3)
    failed = [number for number, answer in enumerate(given) if answer["error"]]
    assert failed == [10]
    assert given[10]["error"] == "SourceError"
    assert "longer than encoder.max_length" in given[10]["value"]
    done = store.done([unit.key for unit in cut])
    assert set(done) == {unit.key for unit in cut} - {cut[10].key}
    for number, answer in enumerate(given):  # a receipt is given once its shard is whole, and says what the shard says
        if number != 10:
            assert done[cut[number].key] == Receipt(**json.loads(answer["value"]))


def test_a_disk_that_is_full_is_one_line(tiny, tmp_path, cut):
    (tmp_path / "store").write_text("a file where a folder has to be")
    (answer,) = answers(actor(tiny, Store(str(tmp_path / "store"))), cut[:1], 1)
    assert answer["error"] == "StoreError"
    assert "cannot be written on" in answer["value"]
