import json
import os
import time
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import with_vectors

from bertray.errors import StoreError
from bertray.store import Manifest, Receipt, Store
from bertray.vectors import vectors_of

NO_REJECTS = pa.table({"id": pa.array([], pa.string()), "reason": [], "preview": []})


def filled(folder, dtype=np.float16, units=3):
    store = Store(str(folder))
    receipts = []
    for unit in range(units):
        rows = pa.table({"id": [f"{unit}-{i}" for i in range(4)], "text": ["t"] * 4, "label": ["a", "b", "a", "b"]})
        vectors = np.full((4, 5), unit, dtype)
        receipts.append(Receipt(f"u{unit}", 4, 0, 0, 1, 20, 0.1, {"a": 2, "b": 2}))
        store.write_shard(receipts[-1], with_vectors(rows, vectors), NO_REJECTS)
    return store, Manifest("print", {"columns": {"text_pair": ""}, "features": ["mean_6"]}, tuple(receipts))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_and_labels_come_back_in_order_as_they_were(tmp_path, dtype):
    store, manifest = filled(tmp_path, dtype)
    store.finish(manifest)
    vectors, labels = store.load()
    assert vectors.dtype == dtype
    assert vectors[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert labels == ["a", "b", "a", "b"] * 3
    assert store.manifest() == manifest
    assert (manifest.total("rows"), manifest.total("truncated"), manifest.labels) == (12, 3, {"a": 6, "b": 6})
    assert vectors_of(next(store.tables(["mean_6"])), ["mean_6"]).shape == (4, 5)


def test_without_a_manifest_a_store_is_not_complete(tmp_path):
    store, _ = filled(tmp_path)
    with pytest.raises(StoreError, match="is not complete. Run `bertray embed`"):
        store.load()
    assert set(store.done(["u0", "u2", "u7"])) == {"u0", "u2"}


def test_a_shard_that_is_not_whole_counts_as_missing(tmp_path):
    store, _ = filled(tmp_path)
    store.shard("u1").write(store.shard("u1").read()[:-9])
    assert set(store.done(["u0", "u1", "u2"])) == {"u0", "u2"}


def test_receipts_without_times_are_those_of_before(tmp_path):
    store, manifest = filled(tmp_path)
    store.finish(manifest)
    shard = store.shard("u1").path
    saved = json.loads((tmp_path / "manifest.json").read_text())
    for unit in saved["units"]:
        del unit["spent"]
    (tmp_path / "manifest.json").write_text(json.dumps(saved))
    table, old = pq.read_table(shard), {"unit": "u1", **saved["units"][1]}
    with pq.ParquetWriter(shard, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"bertray.receipt": json.dumps(old), "bertray.checksum": ""})
    assert store.receipt("u1") == store.manifest().units[1] == manifest.units[1]
    assert store.receipt("u1").spent == {}


def test_a_receipt_is_told_the_time_when_its_shard_is_made(tmp_path):
    store = Store(str(tmp_path))
    receipt = store.write_shard(
        Receipt("u", 1, 0, 0, 0, 3, 0.1), pa.table({"id": ["a"], "label": ["b"]}), NO_REJECTS, lambda: {"encode": 1.5}
    )
    assert receipt.spent == store.receipt("u").spent == {"encode": 1.5}
    assert store.check(receipt).num_rows == 1


@pytest.mark.parametrize(
    ("url", "name"), [("s3://box/runs/demo/stores/train-1a", "demo"), ("/runs/out/", "out"), ("s3://box", "box")]
)
def test_a_store_knows_the_name_of_its_run(url, name):
    assert Store(url).run_name == name


def test_shards_of_other_units_stay_and_do_not_count(tmp_path):
    store, manifest = filled(tmp_path)
    rejects = pa.table({"id": ["x"], "reason": ["text is null"], "preview": [""]})
    store.write_shard(Receipt("old", 0, 1, 0, 0, 0, 0.1), pa.table({"id": []}), rejects)
    store.finish(manifest)
    assert store.shard("old").exists()
    assert store.manifest().total("rejected") == 0
    assert len(store.load()[1]) == 12
    store.prune(manifest)
    assert [file.name for file in store.location.files()] == [
        "manifest.json",
        *(f"shards/u{i}.parquet" for i in range(3)),
    ]


def test_damage_is_told_with_what_to_do(tmp_path):
    store, manifest = filled(tmp_path)
    store.finish(manifest)
    store.shard("u1").delete()
    with pytest.raises(StoreError, match="u1.parquet is missing or damaged .* encodes its rows again"):
        store.load()
    (store.location / "manifest.json").write(b"{")
    with pytest.raises(StoreError, match="manifest.json is damaged"):
        store.manifest()


def test_what_a_kill_left_half_written_is_swept(tmp_path):
    store, _ = filled(tmp_path)
    partial = tmp_path / "shards" / ".u1.parquet.0a1b2c3d.partial"
    partial.write_bytes(store.shard("u1").read()[:100])
    kept = tmp_path / "shards" / ".of-somebody-else"
    kept.write_text("x")
    store.write_plan({"files": []})
    assert not partial.exists()
    assert kept.exists()
    assert store.plan() == {"files": []}


def test_another_plan_takes_the_manifest_along(tmp_path):
    store, manifest = filled(tmp_path)
    store.write_plan({"files": ["a"]})
    store.finish(manifest)
    store.write_plan({"files": ["a"]})
    assert store.manifest() == manifest
    store.write_plan({"files": ["a", "b"]})
    assert store.manifest() is None
    assert set(store.done(["u0", "u1", "u2"])) == {"u0", "u1", "u2"}


def test_attempts_are_counted_by_run_and_in_all(tmp_path):
    store = Store(str(tmp_path))
    assert (store.begin("u", "a").number, store.begin("u", "a").number) == (1, 2)
    again = store.begin("u", "b", "node")
    assert (again.number, again.lost, again.node) == (1, 2, "node")
    (file,) = store.attempts()
    assert file.name == "u.json"
    store.renew("u", again)
    assert store.attempts()[0].stamp != file.stamp
    store.end("u")
    assert store.attempts() == []
    assert store.begin("u", "b").lost == 0


def test_receipts_that_are_noted_stand_for_the_shards_own(tmp_path, monkeypatch):
    store, _ = filled(tmp_path)
    expected = store.done(["u0", "u1", "u2"])
    store.note([expected["u0"], expected["u1"]])
    store.shard("u1").delete()
    read, receipt = [], Store.receipt
    monkeypatch.setattr(Store, "receipt", lambda store, unit: read.append(unit) or receipt(store, unit))
    assert store.done(["u0", "u1", "u2"]) == {"u0": expected["u0"], "u2": expected["u2"]}
    assert read == ["u2"]


def test_a_shard_that_is_written_after_its_receipt_was_noted_tells_its_own(tmp_path):
    store, _ = filled(tmp_path)
    before = store.done(["u0", "u1"])
    store.note(list(before.values()))
    store.shard("u1").write(store.shard("u1").read()[:-9])
    later = time.time() + 5
    for unit, receipt in (("u0", replace(before["u0"], seconds=9.5)), ("u1", None)):
        if receipt:
            rows = pa.table({"id": ["x"] * 4, "text": ["t"] * 4, "label": ["a"] * 4})
            before[unit] = store.write_shard(receipt, with_vectors(rows, np.zeros((4, 5))), NO_REJECTS)
        os.utime(store.shard(unit).path, (later, later))
    assert store.done(["u0", "u1"]) == {"u0": before["u0"]}
    (note,) = (tmp_path / "receipts").iterdir()
    note.write_text("{")
    os.utime(note, (later, later))
    assert store.done(["u0", "u1"]) == {"u0": before["u0"]}


def test_the_manifest_is_plain_json_and_the_old_form_is_read(tmp_path):
    store, manifest = filled(tmp_path)
    store.finish(manifest)
    file = tmp_path / "manifest.json"
    assert json.loads(file.read_text()) == json.loads(json.dumps(asdict(manifest)))
    assert len(file.read_text().splitlines()) < 20
    file.write_text(json.dumps(asdict(manifest), indent=1))
    assert store.manifest() == manifest
