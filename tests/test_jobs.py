"""`ray job submit` against a real cluster from `ray start`, with token authentication on."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import MINILM, ROOT, free_port, wait_until

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of a user who started a cluster as the README says, with a home folder of its own."""
    home = tmp_path_factory.mktemp("home")
    port, dashboard = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{Path(RAY).parent}{os.pathsep}{environment['PATH']}"  # as after `activate`
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": f"/tmp/bertray-{os.getpid()}"}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, timeout=60, capture_output=True)
    started = subprocess.run(
        [RAY, "start", "--head", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
         "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={environment['RAY_TMPDIR']}"],
        env=environment, timeout=90, capture_output=True, text=True,
    )  # fmt: skip
    assert started.returncode == 0, started.stdout + started.stderr
    yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    # Not `ray stop`, which ends every cluster on the machine: only what inherited this one's folder.
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if environment["RAY_TMPDIR"].encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def submit(cluster, *command, options=()):
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [RAY, "job", "submit", "--working-dir", ".", *options, "--", "python", *map(str, command)],
            env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        # Ray takes jobs some seconds after `ray start` has returned.
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def test_the_whole_job_is_submitted(cluster):
    done = submit(cluster, "jobs/pipeline.py", "jobs/specs/demo.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert "this is great news! -> positive" in done.stdout
    # Not into the job's own copy of the folder, which Ray deletes.
    output = Path(cluster["HOME"]) / "runs" / "demo"
    assert f"written to {output} instead" in done.stdout
    summary = json.loads((output / "metrics.json").read_text())
    assert summary["metrics"]["test"]["accuracy"] > 0.82
    # Again: nothing is left to do, and a bad spec fails the job with one line.
    again = submit(cluster, "jobs/fit.py", "jobs/specs/demo.yaml", "--output", output)
    assert "embedding: done already" in again.stdout
    assert "fitting: done already" in again.stdout
    bad = submit(cluster, "jobs/embed.py", "jobs/specs/demo.yaml", "--set", "head.lr=x")
    assert bad.returncode != 0
    assert "head.lr must be a number above 0" in bad.stdout + bad.stderr


def job(cluster, *arguments):
    done = subprocess.run([RAY, "job", *arguments], env=cluster, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(cluster, rows_file, tmp_path):
    rows = [{"id": f"r{i}", "text": f"{i} the cat sat on the mat and looked at the rain " * 8} for i in range(4_000)]
    data = {"train": {"path": rows_file([row | {"label": "x"} for row in rows])}, "id": "id", "unit_rows": 50}
    spec = {"data": data, "encoder": {"model": MINILM, "pooling": "mean"}, "output": str(tmp_path / "run")}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    first = submit(cluster, "jobs/embed.py", tmp_path / "spec.yaml", options=["--no-wait", "--submission-id", "first"])
    assert first.returncode == 0, first.stdout + first.stderr
    wait_until(lambda: len(list(tmp_path.rglob("shards/*.parquet"))) > 3, 90, lambda: job(cluster, "logs", "first"))
    assert "first" in job(cluster, "stop", "first")
    wait_until(lambda: "was stopped" in job(cluster, "status", "first"), 60, lambda: job(cluster, "status", "first"))
    assert "embedding: 80 units on" in job(cluster, "logs", "first")
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("shards/*.parquet")}
    assert 3 < len(done) < 80

    again = submit(cluster, "jobs/embed.py", tmp_path / "spec.yaml")
    assert again.returncode == 0, again.stdout + again.stderr
    assert re.search(r"embedding: \d+ of 4000 rows are done already", again.stdout)
    shards = {path.name: path for path in tmp_path.rglob("shards/*.parquet")}
    assert len(shards) == 80 and all(shards[name].stat().st_mtime_ns == written for name, written in done.items())
    ids = [value for path in shards.values() for value in pq.read_table(path, columns=["id"])["id"].to_pylist()]
    assert sorted(ids) == sorted(row["id"] for row in rows)


def test_a_service_is_deployed_and_its_heads_are_swapped_by_its_config(cluster, demo, tmp_path):
    config = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    (application,) = config["applications"]
    (gate,) = application["deployments"]
    application["args"] |= {"heads": {"mood": demo["bundle"]}, "num_cpus": 0.5}

    def deploy(*names):
        gate["user_config"] = {"heads": {name: demo["bundle"] for name in names}}
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        command = [str(Path(RAY).with_name("serve")), "deploy", str(tmp_path / "serve.yaml")]
        address = {"RAY_DASHBOARD_ADDRESS": cluster["RAY_API_SERVER_ADDRESS"]}
        done = subprocess.run(command, env=cluster | address, cwd=ROOT, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr

    def served():
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/heads", timeout=5) as got,
        ):
            return [head["name"] for head in json.load(got)["heads"]]

    deploy("mood")
    wait_until(lambda: served() == ["mood"], 120)
    body = json.dumps({"inputs": "this is great news!"}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", body, timeout=60) as answer:
        assert json.load(answer)[0]["label"] == "positive"
    deploy("mood", "second")
    wait_until(lambda: served() == ["mood", "second"], 60)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/heads/second/predict", body, timeout=60) as answer:
        assert json.load(answer)["predictions"][0]["label"] == "positive"


def test_without_a_token_the_cluster_refuses(cluster, tmp_path):
    stranger = {**cluster, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    refused = submit(stranger, "jobs/pipeline.py", "jobs/specs/demo.yaml")
    assert refused.returncode != 0
    assert re.search("authentication", refused.stdout + refused.stderr, re.I)


@pytest.mark.parametrize("script", ["pipeline", "embed", "fit", "evaluate", "predict", "publish", "serve"])
def test_every_job_is_a_command(script):
    done = subprocess.run(
        [sys.executable, f"jobs/{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"usage: bertray {'run' if script == 'pipeline' else script}" in done.stdout
