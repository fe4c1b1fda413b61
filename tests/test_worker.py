"""The actor alone, called as Ray Data calls it: several units at once."""

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.checkpoints import find
from bertray.clock import BESIDE, HELD, account
from bertray.sources import Columns, units
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import Source
from bertray.storage import Location
from bertray.store import Receipt, Store
from bertray.worker import Job, UnitEncoder

COLUMNS = Columns("text", label="label")


@pytest.fixture
def cut(rows_file):
    """60 rows in 20 units; the text of row 31 is too long, and row 45 has another label."""
    rows = [{"text": f"text number {i} " * (40 if i == 31 else 1), "label": i % 2} for i in range(60)]
    rows[45]["label"] = "odd"
    return units(Source(path=rows_file(rows)), COLUMNS, 3)


def actor(tiny, store, names=(), run="run", **spec):
    return UnitEncoder(job(tiny, store, names, run, **spec), "cpu", 2)


def job(model, store, names=(), run="run", **spec):
    found = find(str(model))
    encoder = EncoderSpec(model=str(model), pooling="mean", max_length=64, precision="fp32", **spec)
    return Job(found.name, found.revision, found.identity, encoder, names, {"a": COLUMNS}, {"a": store}, run=run)


def answers(encoder, cut, at_once):
    def call(unit):
        (answer,) = encoder(pa.Table.from_pylist([{"units": [{"split": "a", **asdict(unit)}]}])).to_pylist()
        return answer

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(call, cut))


def test_units_at_once_give_what_one_after_another_gives(tiny, tmp_path, cut):
    alone, together = Store(str(tmp_path / "alone")), Store(str(tmp_path / "together"))
    expected = answers(actor(tiny, alone), cut, 1)
    for given, answer in zip(answers(actor(tiny, together), cut, 3), expected, strict=True):
        assert not given["error"]
        ours, theirs = ({**json.loads(a["value"]), "seconds": 0, "spent": {}, "checksum": ""} for a in (given, answer))
        assert ours == theirs
    for unit in cut:
        assert pq.read_table(together.shard(unit.key).path).equals(pq.read_table(alone.shard(unit.key).path))


def test_receipts_tell_where_the_time_went(tiny, tmp_path, cut):
    store, started = Store(str(tmp_path / "store")), time.perf_counter()
    encoder = actor(tiny, store)
    begun = time.perf_counter()
    answers(encoder, cut[:10], 3)
    pause = time.perf_counter()
    time.sleep(0.5)
    waited = time.perf_counter() - pause
    answers(encoder, cut[10:], 1)
    passed = time.perf_counter() - started
    receipts = store.done([unit.key for unit in cut])
    total = account(receipt.spent for receipt in receipts.values())["seconds"]
    assert passed - 0.5 < sum(total[name] for name in HELD) < passed + 0.01  # but for what is behind the last receipt
    assert begun - started - 0.5 < total["start"] < begun - started + 0.01
    assert waited <= total["idle"] + 0.01
    assert 0 < total["encode"] <= passed - waited - total["start"]
    assert all(total[name] > 0 for name in BESIDE)
    after = receipts[cut[10].key].spent  # the first one behind the pause
    assert after["idle"] > 0.45 > after.get("encode", 0.0)


def test_a_unit_that_fails_leaves_no_shard_and_the_others_theirs(tiny, tmp_path, cut):
    store = Store(str(tmp_path / "store"))
    given = answers(actor(tiny, store, ("0", "1")), cut, 3)
    failed = [number for number, answer in enumerate(given) if answer["error"]]
    assert failed == [15]
    assert given[15]["error"] == "SourceError"
    assert "label 'odd' is none of data.labels" in given[15]["value"]
    done = store.done([unit.key for unit in cut])
    assert set(done) == {unit.key for unit in cut} - {cut[15].key}
    for number, answer in enumerate(given):  # a receipt is given once its shard is whole, and says what the shard says
        if number != 15:
            assert done[cut[number].key] == Receipt(**json.loads(answer["value"]))
    assert store.attempts() == []


def test_a_block_of_units_ends_at_the_first_that_fails(tiny, tmp_path, cut):
    store = Store(str(tmp_path / "store"))
    block = {"units": [{"split": "a", **asdict(unit)} for unit in cut[13:18]]}
    given = actor(tiny, store, ("0", "1"))(pa.Table.from_pylist([block])).to_pylist()
    assert [answer["error"] for answer in given] == ["", "", "SourceError"]
    assert set(store.done([unit.key for unit in cut])) == {unit.key for unit in cut[13:15]}


def test_a_row_that_fails_is_set_aside_with_its_reason(tiny, tmp_path, cut):
    plain, strict = Store(str(tmp_path / "plain")), Store(str(tmp_path / "strict"))
    answers(actor(tiny, plain), cut[10:11], 1)
    (answer,) = answers(actor(tiny, strict, truncation="error"), cut[10:11], 1)
    receipt = Receipt(**json.loads(answer["value"]))
    assert (receipt.rows, receipt.rejected, receipt.truncated) == (2, 1, 0)
    assert receipt.labels == {"0": 2}
    (reject,) = strict.rejects(receipt.unit)
    assert reject == {
        "id": "rows.jsonl:31",
        "reason": "longer than 64 tokens",
        "preview": ("text number 31 " * 40)[:80],
    }
    kept, all_rows = strict.check(receipt), plain.check(plain.receipt(cut[10].key))
    assert kept.equals(all_rows.take([0, 2]).cast(kept.schema))


def test_a_unit_whose_processes_end_again_and_again_is_given_up(tiny, tmp_path, cut):
    store = Store(str(tmp_path / "store"))
    for number in range(1, 6):  # each time as if the process had ended
        assert store.begin(cut[0].key, "run").number == number
    (answer,) = answers(actor(tiny, store, run="run"), cut[:1], 1)
    assert answer["error"] == "StoreError"
    assert f"{cut[0].url}, rows 0 to 3: encoder processes have ended 5 times" in answer["value"]
    (answer,) = answers(actor(tiny, store, run="another"), cut[:1], 1)  # another run has its own attempts
    assert Receipt(**json.loads(answer["value"])).lost == 6
    assert store.attempts() == []
    assert answers(actor(tiny, store, run="third"), cut[:1], 1)[0]["value"] == answer["value"]  # done is done


def test_a_disk_that_is_full_is_one_line(tiny, tmp_path, cut):
    (tmp_path / "store").write_text("a file where a folder has to be")
    (answer,) = answers(actor(tiny, Store(str(tmp_path / "store"))), cut[:1], 1)
    assert answer["error"] == "StoreError"
    assert "cannot be written on" in answer["value"]


FAILING = """
import sys
from bertray.worker import UnitEncoder
import test_worker
from pathlib import Path
from bertray.store import Store
from bertray.sources import units
from bertray.spec import Source

folder, kind = Path(sys.argv[1]), sys.argv[3]
encoder = test_worker.actor(folder, Store(sys.argv[2] + "/store"))
def start(tokens):
    raise RuntimeError(kind)
encoder.encoder.backend.start = start
(answer,) = test_worker.answers(encoder, units(Source(path=sys.argv[2] + "/rows.jsonl"), test_worker.COLUMNS, 9)[:1], 1)
print(answer["error"], answer["value"])
"""


@pytest.mark.parametrize("kind", ["CUDA error: unspecified launch failure", "no idea"])
def test_what_is_no_rows_fault_is_a_line_and_a_lost_device_ends_the_process(tiny, tmp_path, cut, kind):
    """A process whose GPU has failed cannot go on, but the one that Ray starts in its place can."""
    command = [sys.executable, "-c", FAILING, str(tiny), str(tmp_path), kind]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    if kind.startswith("CUDA"):
        assert done.returncode == 1
        assert done.stdout == ""
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("BertrayError ")
        assert "rows.jsonl, rows 0 to 9: unexpected RuntimeError: no idea" in done.stdout


def test_a_model_that_changes_in_its_store_stops_only_nodes_that_have_no_copy(s3, tiny, tmp_path, cut, monkeypatch):
    url = f"{s3}/models/changing"
    for file in tiny.iterdir():
        (Location(url) / file.name).write(file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    begun = job(url, Store(str(tmp_path / "store")))
    config = json.loads((tiny / "config.json").read_text())
    (Location(url) / "config.json").write(json.dumps(config | {"layer_norm_eps": 1e-3}).encode())
    assert not any(answer["error"] for answer in answers(UnitEncoder(begun, "cpu", 2), cut[:2], 2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    (answer,) = answers(UnitEncoder(begun, "cpu", 2), cut[2:3], 1)
    assert answer["error"] == "CheckpointError"
    assert re.match(f"{url} is not the same on .*, or has changed since. Give every node the same", answer["value"])
    assert "\n" not in answer["value"]
