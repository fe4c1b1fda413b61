"""Doing harm to a running command: its processes are found by /proc and killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.processes import titled
from bertray.store import Store
from bertray.vectors import vectors_of

TARGETS = ("worker", "raylet", "driver")
_MARKS = {"worker": "UnitEncoder", "raylet": "/raylet/raylet\0", "gcs": "/gcs_server\0"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def bertray(*arguments, **options):
    """Start the command as a process of its own."""
    command = [str(Path(sys.executable).parent / "bertray"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def embed_spec(folder, **parts):
    """A spec of its own Ray, written as a file."""
    spec = {"ray": {"address": "local"}, "output": str(folder / "run"), **parts}
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder / "spec.json"


def find(pid, target):
    """The id of a process of a running command, or None."""
    if target == "driver":
        return pid
    return next(iter(titled(pid, _MARKS[target])), None)


def kill_at_random(start, run, units, kills, seed, targets=TARGETS, pause=(0.5, 6.0), limit=900):
    """Start a command again and again, and kill at random moments until there were enough kills; then let it end.

    Args:
        start: starts the command; run: its folder; units: that it encodes in all.
        pause: seconds from when there is a worker to a kill, which comes sooner where the command would be done first.

    Returns:
        What was killed, each with how many shards there were.
    """
    rng, killed, deadline = random.Random(seed), [], time.monotonic() + limit
    order = [target for _ in range(kills) for target in rng.sample(targets, len(targets))]  # each kind comes in turn
    while True:
        process = start()
        while len(killed) < kills and process.poll() is None:
            assert time.monotonic() < deadline, f"not done in time, seed {seed}, after {killed}"
            if find(process.pid, "worker") is None:
                time.sleep(0.1)
                continue
            until, most = time.monotonic() + rng.uniform(*pause), units * (len(killed) + 1) // (kills + 1)
            while time.monotonic() < until and _shards(run) < most and process.poll() is None:
                time.sleep(0.02)
            target = order[len(killed)]
            if process.poll() is None and (pid := find(process.pid, target)):
                shards = _shards(run)
                os.kill(pid, signal.SIGKILL)
                killed.append((target, shards))
                print(f"seed {seed}: kill {len(killed)}: {target}, with {shards} shards written", flush=True)
                if target != "worker":
                    break
        _, errors = process.communicate(timeout=max(1, deadline - time.monotonic()))
        if process.returncode == 0:
            return killed
        assert "Traceback" not in errors, errors
        assert len(errors.strip().splitlines()[-1]) < 300


def _shards(run):
    return len(list(run.rglob("shards/*.parquet")))


def contents(run):
    """All ids, texts and vectors of a run's only store, in the order of the rows."""
    (folder,) = (run / "stores").iterdir()
    store = Store(str(folder))
    names = store.complete().features
    tables = [pq.read_table(store.shard(receipt.unit).path) for receipt in store.complete().units]
    ids = [one for table in tables for one in table["id"].to_pylist()]
    texts = [one for table in tables for one in table["text"].to_pylist()]
    return (
        ids,
        texts,
        np.concatenate([vectors_of(table, names) for table in tables]),
        store.complete(),
    )
