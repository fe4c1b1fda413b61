"""The log of a run's steps, on disk and in an object store; a run that fails, stops or is killed."""

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

import bertray
from bertray.errors import SourceError
from bertray.journal import Journal, entries
from bertray.storage import Location


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
    if request.param == "disk":
        return Location(str(tmp_path / "run"))
    return Location(request.getfixturevalue("s3")) / tmp_path.name


def test_each_step_has_a_start_and_an_end(folder):
    journal = Journal(folder, "r" * 32, price=2.0)
    with journal.step("embed") as told:
        (_, begun) = entries(folder)  # a crash now leaves this
        assert (begun["step"], begun["event"]) == ("embed", "start")
        told["rows"] = 7
    with pytest.raises(SourceError), journal.step("fit"):
        raise SourceError("rows.csv\nis gone \udcff")
    with pytest.raises(KeyboardInterrupt), journal.step("evaluate"):
        raise KeyboardInterrupt
    first, *steps = entries(folder)
    assert (first["step"], first["price"], first["run"]) == ("run", 2.0, "r" * 32)
    assert [(line["step"], line["event"], line.get("outcome")) for line in steps] == [
        ("embed", "start", None),
        ("embed", "end", "done"),
        ("fit", "start", None),
        ("fit", "end", "failed"),
        ("evaluate", "start", None),
        ("evaluate", "end", "stopped"),
    ]
    assert steps[1]["rows"] == 7 and steps[1]["seconds"] >= 0
    assert steps[3]["error"] == "SourceError: rows.csv is gone \\udcff"
    times = [datetime.fromisoformat(line["time"]) for line in (first, *steps)]
    assert times == sorted(times) and all(at.tzinfo == UTC for at in times)


def test_attempts_follow_one_another_and_damage_is_passed_over(folder):
    for run in ("b", "a"):
        with Journal(folder, run * 8).step("embed"):
            pass
    assert [line["run"][0] for line in entries(folder)] == ["b"] * 3 + ["a"] * 3
    file = (folder / "logs").files()[0]
    Location(file.url).write(Location(file.url).read()[:-5])
    assert [line["run"][0] for line in entries(folder)] == ["b"] * 2 + ["a"] * 3


KILLED = """
import os, sys
from bertray.journal import Journal
from bertray.storage import Location
journal = Journal(Location(sys.argv[1]), "run")
with journal.step("embed"): pass
with journal.step("fit"): os.kill(os.getpid(), 9)
"""


def test_a_kill_leaves_what_was_done_so_far(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60)
    found = [(line["step"], line["event"]) for line in entries(Location(str(tmp_path)))]
    assert found == [("run", "start"), ("embed", "start"), ("embed", "end"), ("fit", "start")]


def test_a_disk_that_takes_no_log_stops_no_step(tmp_path):
    (tmp_path / "logs").write_text("a file where a folder has to be")
    with Journal(Location(str(tmp_path)), "run").step("embed") as told:
        told["rows"] = 1


def test_a_run_and_its_repetition(tiny, tmp_path, rows_file, ray_cluster):
    spec = {
        "data": {"train": rows_file([{"text": f"text {i}", "label": i % 2} for i in range(40)]), "unit_rows": 10},
        "encoder": {"model": str(tiny), "pooling": "mean"},
        "ray": {"price": 3.0},
        "output": str(tmp_path / "run"),
    }
    summary = bertray.run(spec)
    log = list(entries(Location(spec["output"])))
    ends = {line["step"]: line for line in log if line["event"] == "end"}
    assert list(ends) == ["embed", "fit", "evaluate", "report"]
    assert {line["outcome"] for line in ends.values()} == {"done"}
    assert ends["embed"]["rows"]["train"]["rows"] == 40
    assert (
        ends["embed"]["spent"] == summary["spent"] == json.loads((tmp_path / "run/metrics.json").read_text())["spent"]
    )
    spent = summary["spent"]
    assert spent["cost"] == pytest.approx(
        3.0 * sum(spent["seconds"][n] for n in ("start", "encode", "idle")) / 3600, 1e-2
    )
    assert sum(spent["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert "device-hours at 3)" in (tmp_path / "run/report.html").read_text()
    again = bertray.run(spec)
    assert again["spent"] == spent
    more = list(entries(Location(spec["output"])))[len(log) :]
    assert [line["outcome"] for line in more if line["event"] == "end"] == ["done already"] * 3
    with pytest.raises(bertray.BertrayError):
        bertray.run({**spec, "data": {**spec["data"], "test": rows_file([{"text": "a", "label": "?"}], "t.jsonl")}})
    last = list(entries(Location(spec["output"])))[-1]
    assert last["outcome"] == "failed" and "\n" not in last["error"]
