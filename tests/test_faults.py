"""What goes wrong while a run is at work: processes that hang or end, a disk that fills, a second run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from chaos import ENVIRONMENT, bertray, contents, embed_spec, find
from conftest import MINILM

from bertray import audit

pytestmark = pytest.mark.timeout(300)
ROWS = 1_500
WORDS = "the cat sat on the mat and looked at the rain for a long while " * 8


@pytest.fixture
def many(rows_file):
    """1,500 rows in 30 units, enough for the encoder to be met at work."""
    return rows_file([{"id": f"r{i}", "text": f"{i} {WORDS}", "label": i % 2} for i in range(ROWS)])


def spec(folder, many, **ray):
    return embed_spec(
        folder,
        data={"train": many, "id": "id", "unit_rows": 50},
        encoder={"model": MINILM, "pooling": "mean"},
        ray={"address": "local", **ray},
    )


def ended(process, timeout=120):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def wait_for(condition, process=None, timeout=60):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    return found


@pytest.fixture
def end_at():
    """A function that kills a command's encoder process each time it notes another attempt of a kind."""
    stopped = threading.Event()
    threads = []

    def begin(process, run, kind):
        def kill():
            seen = set()
            while not stopped.is_set() and process.poll() is None:
                for note in run.rglob(f"running/{kind}"):
                    with suppress(OSError, ValueError):
                        attempt = json.loads(note.read_text())
                        if (
                            attempt["pid"] not in seen and attempt["number"] <= 5
                        ):  # then it does nothing that could end it
                            os.kill(attempt["pid"], signal.SIGKILL)
                            seen.add(attempt["pid"])
                time.sleep(0.02)

        threads.append(threading.Thread(target=kill))
        threads[-1].start()

    yield begin
    stopped.set()
    for thread in threads:
        thread.join()


def test_a_process_that_hangs_is_ended_and_its_units_are_begun_again(many, tmp_path):
    process = bertray("embed", spec(tmp_path, many, patience=6), "--json")
    run = tmp_path / "run"
    wait_for(lambda: list(run.rglob("running/*.json")) and list(run.rglob("shards/*")), process)
    os.kill(find(process.pid, "worker"), signal.SIGSTOP)
    code, output, errors = ended(process)
    assert code == 0, errors
    assert "has shown no sign of life for 6 s: it is ended, and begun again" in errors
    most = 4 * errors.count("it is ended")  # more than one on a machine that is very busy
    assert 1 <= json.loads(output)["faults"]["units_begun_again"] <= most
    assert len(set(contents(run)[0])) == ROWS
    assert audit.verify(str(run))["ok"]


def test_a_process_that_ends_at_one_unit_again_and_again_stops_the_run_in_one_line(many, tmp_path, end_at):
    """As a text would that the encoder's libraries die of."""
    process, run = bertray("embed", spec(tmp_path, many)), tmp_path / "run"
    end_at(process, run, "rows.jsonl-0000000500-*.json")
    code, _, errors = ended(process, 200)
    assert code == 2, errors
    assert re.search(r"rows \d+ to \d+: encoder processes have ended 5 times while they were at work", errors)
    assert "Traceback" not in errors
    assert len(list(run.rglob("shards/*"))) > 5  # what is written is kept


def test_processes_that_cannot_start_stop_the_run_in_one_line(many, tmp_path, end_at):
    process, run = bertray("embed", spec(tmp_path, many)), tmp_path / "run"
    end_at(process, run, "start-*.json")
    code, _, errors = ended(process, 150)
    assert code == 2, errors
    assert "has ended 5 times while it started: killed, or out of memory" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors


TWO_NODES = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print("NODES", cluster.address, node.node_id, flush=True)
input()
cluster.remove_node(node, allow_graceful=False)
print("KILLED", flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture
def two_nodes():
    """A cluster of two nodes of a CPU each on this machine: its address, the second node, and what kills that."""
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def answer(word):
        return next(line.split()[1:] for line in process.stdout if line.startswith(word))

    def kill():
        process.stdin.write("\n")
        process.stdin.flush()
        answer("KILLED")

    yield *answer("NODES"), kill
    process.communicate("\n", timeout=60)


def test_the_units_of_a_node_that_dies_go_to_others(many, tmp_path, two_nodes):
    address, second, kill = two_nodes
    file = spec(tmp_path, many, address=address, workers=2, cpus_per_worker=1, patience=8)
    process, run = bertray("embed", file, "--json"), tmp_path / "run"

    def on_second():
        notes = [json.loads(note.read_text() or "{}") for note in run.rglob("running/rows*.json")]
        return {note["pid"] for note in notes if note.get("node") == second}

    pids = wait_for(on_second, process)
    kill()
    for pid in pids:  # as a machine takes its processes along
        os.kill(pid, signal.SIGKILL)
    code, output, errors = ended(process, 200)
    assert code == 0, errors
    assert json.loads(output)["faults"]["units_begun_again"] >= 1
    assert len(set(contents(run)[0])) == ROWS
    assert audit.verify(str(run))["ok"]


def test_a_second_run_of_the_same_spec_is_refused(many, tmp_path):
    file = spec(tmp_path, many)
    first = bertray("embed", file)
    wait_for(lambda: list((tmp_path / "run").rglob("running/*.json")), first)
    status = json.loads(ended(bertray("status", tmp_path / "run", "--json"))[1])
    assert status["running"]["pid"] == first.pid
    assert status["stores"][0]["rows_missing"] > 0
    code, _, errors = ended(bertray("embed", file))
    assert code == 2
    assert f"Another run (process {first.pid} on " in errors
    assert len(errors.strip().splitlines()) == 1
    first.kill()
    assert ended(first)[0] != 0


def test_a_run_that_is_killed_says_so(many, tmp_path):
    process = bertray("embed", spec(tmp_path, many))
    wait_for(lambda: list((tmp_path / "run").rglob("shards/*")), process)
    os.kill(find(process.pid, "raylet"), signal.SIGKILL)
    code, _, errors = ended(process)
    assert code != 0
    assert errors.strip().splitlines()[-1].startswith("bertray: ended from outside")
    assert "the same command goes on from here" in errors


def test_a_disk_that_fills_is_one_line_and_with_room_the_same_command_finishes(many, tmp_path, small_disk):
    disk, make_room = small_disk
    spec(disk, many)
    code, _, errors = ended(bertray("embed", disk / "spec.json"))
    assert code == 2, errors
    last = errors.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert "the same command goes on from here" in last
    assert len([line for line in errors.splitlines() if "No space" in line]) == 1
    assert "Traceback" not in errors
    done = len(list(disk.rglob("shards/*.parquet")))
    assert not list(disk.rglob("*.partial"))
    make_room()
    code, _, errors = ended(bertray("embed", disk / "spec.json"))
    assert code == 0, errors
    assert done == 0 or f"{done * 50} of {ROWS} rows are done already" in errors
    assert len(set(contents(disk / "run")[0])) == ROWS
    assert audit.verify(str(disk / "run"))["ok"]
