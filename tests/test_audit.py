"""Status and verification of a run's folder, and its repair."""

import json
import os
import platform
import shutil
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from chaos import ENVIRONMENT, embed_spec
from chaos import bertray as bertray_command
from conftest import MINILM
from test_faults import wait_for

import bertray
from bertray import audit
from bertray.errors import BertrayError, SourceError
from bertray.storage import Location
from bertray.store import Store


@pytest.fixture(scope="module")
def embedded(tiny, tmp_path_factory, ray_cluster):
    """A run of 60 rows in 6 units, one of them set aside, with a head."""
    folder = tmp_path_factory.mktemp("audit")
    rows = [{"text": f"text number {i}" if i != 7 else None, "label": i % 2} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "data": {"train": str(folder / "rows.jsonl"), "unit_rows": 10},
        "encoder": {"model": str(tiny), "pooling": "mean"},
        "output": str(folder / "run"),
    }
    bertray.run(spec, until="fit")
    return folder


@pytest.fixture
def run(embedded, tmp_path):
    """A copy of that run, to do harm to; its source stays where it was."""
    shutil.copytree(embedded / "run", tmp_path / "run")
    return tmp_path / "run"


def shards(run):
    return sorted(run.rglob("shards/*.parquet"))


def problems(run, **options):
    (store,) = audit.verify(str(run), **options)["stores"]
    return store["problems"]


def test_status_of_a_run_that_is_done(run):
    found = audit.status(str(run))
    (store,) = found["stores"]
    assert (store["rows"], store["rows_done"], store["rows_missing"], store["rejected"]) == (60, 60, 0, 1)
    assert (store["units"], store["units_done"], store["complete"]) == (6, 6, True)
    assert store["rows_per_second"] > 0
    assert store["at_work"] == []
    assert (found["running"], found["head"], found["report"]) == (None, True, False)


def test_status_of_a_run_that_was_killed(run):
    (manifest,) = run.rglob("manifest.json")
    manifest.unlink()
    lost = shards(run)[2]
    lost.unlink()
    Store(str(manifest.parent)).begin(lost.stem, "a run that ended")
    (store,) = audit.status(str(run))["stores"]
    assert (store["rows_done"], store["rows_missing"], store["units_done"], store["complete"]) == (50, 10, 5, False)
    (unit,) = store["at_work"]
    assert (unit["file"], unit["start"], unit["stop"]) == ("rows.jsonl", 20, 30)


def test_status_of_a_run_elsewhere_in_an_object_store(s3, tmp_path, monkeypatch):
    """While it goes on, and when it has ended."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.setitem(ENVIRONMENT, name, os.environ[name])
    lines = (json.dumps({"text": f"{i} the cat sat on the mat " * 12, "label": i % 2}) + "\n" for i in range(3_000))
    Location(f"{s3}/status/rows.jsonl").write("".join(lines).encode())
    run = f"{s3}/status/run"
    file = embed_spec(
        tmp_path,
        data={"train": f"{s3}/status/rows.jsonl", "unit_rows": 50},
        encoder={"model": MINILM, "pooling": "mean"},
        ray={"address": "local", "price": 2.0},
        output=run,
    )
    process = bertray_command("embed", file)

    def status():
        assert process.poll() is None, process.communicate()
        with suppress(BertrayError):  # nothing is there yet
            return audit.status(run)

    seen = [wait_for(lambda: (found := status()) and found["stores"][0]["at_work"] and found)]
    assert seen[0]["running"]["pid"] == process.pid
    assert seen[0]["last"]["step"] == "embed" and seen[0]["last"]["event"] == "start"
    found = wait_for(lambda: (found := status()) and found["stores"][0]["units_done"] > 2 and found)
    (store,), at_work = found["stores"], found["stores"][0]["at_work"]
    assert store["rows_done"] == 50 * store["units_done"] and store["rows_missing"] == 3_000 - store["rows_done"] > 0
    assert store["seconds_left"] == pytest.approx(store["rows_missing"] / store["rows_per_second"], rel=0.02)
    for unit in at_work:
        assert b"UnitEncoder" in (Path("/proc") / str(unit["pid"]) / "cmdline").read_bytes()
        assert unit["host"] == platform.node()
        assert abs(datetime.fromisoformat(unit["since"]).timestamp() + unit["seconds"] - time.time()) < 5
        assert unit["file"] == "rows.jsonl" and unit["stop"] == unit["start"] + 50
    assert 0 < found["spent"]["shares"]["encode"] < 1
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    found = audit.status(run)
    (store,) = found["stores"]
    assert (found["running"], store["complete"], store["rows_missing"], store["at_work"]) == (None, True, 0, [])
    assert (found["last"]["step"], found["last"]["outcome"]) == ("embed", "done")
    assert found["spent"] == found["last"]["spent"] and found["spent"]["cost"] > 0


def test_a_run_that_is_whole(run):
    found = audit.verify(str(run))
    assert found["ok"]
    assert [(store["shards"], store["rows"], store["notes"]) for store in found["stores"]] == [(6, 60, [])]


@pytest.mark.parametrize("place", np.linspace(0, 1, 25))
def test_a_flipped_byte_is_found_wherever_it_is(run, place):
    shard = shards(run)[3]
    broken = bytearray(shard.read_bytes())
    broken[round(place * (len(broken) - 1))] ^= 0x10
    shard.write_bytes(broken)
    (problem,) = problems(run)
    assert problem.startswith(f"{shard.stem}: its shard")


def test_repair_encodes_again_what_is_broken_or_missing_and_nothing_else(run, ray_cluster):
    first, second, third = shards(run)[1:4]
    tables = {shard: pq.read_table(shard) for shard in shards(run)}
    untouched = {shard: shard.stat().st_mtime_ns for shard in shards(run)}
    first.unlink()
    broken = bytearray(second.read_bytes())
    broken[len(broken) // 2] ^= 1
    second.write_bytes(broken)
    shutil.copy(shards(run)[0], third)  # another unit's, whole
    (run / "head" / "bundle.json").stat()
    assert len(problems(run)) == 3
    assert problems(run, repair=True) == []
    assert {shard: pq.read_table(shard) for shard in shards(run)} == tables
    changed = {shard for shard in shards(run) if shard.stat().st_mtime_ns != untouched[shard]}
    assert changed == {first, second, third}
    assert audit.status(str(run))["stores"][0]["complete"]


def test_what_else_is_found(run):
    (manifest,) = run.rglob("manifest.json")
    saved = json.loads(manifest.read_text())
    (rejects,) = run.rglob("rejects/*.jsonl")
    lines = rejects.read_text()
    rejects.write_text("")
    (problem,) = problems(run)
    assert "0 of its 1 rows that were set aside are told of" in problem
    rejects.write_text(lines)
    manifest.write_text(json.dumps(saved | {"units": saved["units"][1:]}))
    (problem,) = problems(run)
    assert "its manifest is missing or of other shards" in problem
    saved["units"][0]["rows"] -= 1
    manifest.write_text(json.dumps(saved))
    (problem,) = problems(run)
    assert "are not the 10 of its file" in problem


def test_ids_that_repeat_in_the_source_are_told_of(tiny, tmp_path, ray_cluster, rows_file):
    rows = [{"id": i % 19, "text": f"text {i}", "label": i % 2} for i in range(20)]
    spec = {
        "data": {"train": rows_file(rows), "id": "id", "unit_rows": 7},
        "encoder": {"model": str(tiny), "pooling": "mean"},
        "output": str(tmp_path / "run"),
    }
    bertray.run(spec, until="embed")
    found = audit.verify(spec["output"])
    assert found["ok"]
    assert found["stores"][0]["notes"] == ["1 ids of the source occur more than once, such as '0' (2 times)"]


def test_a_source_that_changed_is_not_mixed_in(embedded, run, ray_cluster):
    shards(run)[0].unlink()
    rows = (embedded / "rows.jsonl").read_text()
    try:
        (embedded / "rows.jsonl").write_text(rows.replace("text", "words", 1))
        with pytest.raises(SourceError, match="rows.jsonl is gone or not what it was"):
            audit.verify(str(run), repair=True)
    finally:
        (embedded / "rows.jsonl").write_text(rows)


def test_a_folder_that_is_no_run(tmp_path):
    for action in (audit.status, audit.verify):
        with pytest.raises(BertrayError, match="is not the folder of a run"):
            action(str(tmp_path))
