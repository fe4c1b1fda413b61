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
from prometheus_client.parser import text_string_to_metric_families

from bertray.storage import Location
from bertray.store import Store

RAY = str(Path(sys.executable).with_name("ray"))

# As on a cluster that has Ray and no more, where bertray is code that a job brings along: no package of that name.
NOT_INSTALLED = """
from importlib import metadata
find = metadata.MetadataPathFinder.find_distributions
def without(*given):
    return (found for found in find(*given) if found.metadata["Name"] != "bertray")
metadata.MetadataPathFinder.find_distributions = without
"""


@pytest.fixture(scope="module")
def cluster(s3, tmp_path_factory):
    """The environment of a user who started a cluster as the README says, with a home folder of its own, and the
    cluster's address as GCS."""
    home = tmp_path_factory.mktemp("home")
    port, dashboard, metrics = free_port(), free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{Path(RAY).parent}{os.pathsep}{environment['PATH']}"  # as after `activate`
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": f"/tmp/bertray-{os.getpid()}"}
    hooks = tmp_path_factory.mktemp("hooks")
    (hooks / "sitecustomize.py").write_text(NOT_INSTALLED)
    environment["PYTHONPATH"] = str(hooks)
    environment["RAY_metrics_report_interval_ms"] = "1000"  # so that tests need not wait
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, timeout=60, capture_output=True)
    started = subprocess.run(
        [RAY, "start", "--head", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={free_port()}",
         f"--ray-client-server-port={free_port()}",
         "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={environment['RAY_TMPDIR']}"],
        env=environment, timeout=90, capture_output=True, text=True,
    )  # fmt: skip
    assert started.returncode == 0, started.stdout + started.stderr
    addresses = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "GCS": f"127.0.0.1:{port}"}
    yield environment | addresses | {"METRICS": f"http://127.0.0.1:{metrics}"}
    # Not `ray stop`, which ends every cluster on the machine: only what inherited this one's folder.
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if environment["RAY_TMPDIR"].encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def submit(cluster, *command, folder=".", options=()):
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [RAY, "job", "submit", "--working-dir", folder, *options, "--", "python", *map(str, command)],
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


def metrics_of(cluster, run):
    """What the node shows Prometheus of a run: name -> [(labels, value)]."""
    with urllib.request.urlopen(f"{cluster['METRICS']}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name.startswith("ray_bertray_") and sample.labels.get("run") == run:
            found.setdefault(sample.name.removeprefix("ray_bertray_"), []).append((sample.labels, sample.value))
    return found


def test_a_job_is_seen_by_prometheus_and_in_the_dashboard(cluster, rows_file, tmp_path):
    words = "the cat sat on the mat and looked at the rain " * 10
    rows = [
        {"text": f"{i} {words}" if i % 50 else None, "label": "x"} for i in range(4_500)
    ]  # enough for it to be looked at
    files = {"train": rows_file(rows), "test": rows_file(rows[:150], "test.jsonl")}
    spec = {"data": {**files, "unit_rows": 30}, "encoder": {"model": MINILM, "pooling": "mean"}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | {"output": str(tmp_path / "seen")}))
    begun = submit(cluster, "jobs/embed.py", tmp_path / "spec.yaml", options=["--no-wait", "--submission-id", "seen"])
    assert begun.returncode == 0, begun.stdout + begun.stderr

    def told():
        return job(cluster, "logs", "seen")

    wait_until(lambda: "idle_share" in metrics_of(cluster, "seen"), 90, told)
    gauges = metrics_of(cluster, "seen")
    for labels, value in gauges["idle_share"]:
        assert labels["device"] == "cpu" and 0 <= value <= 1
    assert all(value > 0 for _, value in gauges["token_budget"])
    assert "mfu" not in gauges  # the peak of a CPU is not known
    listed = subprocess.run(
        [RAY, "list", "actors", "--address", cluster["RAY_API_SERVER_ADDRESS"], "--format", "json"],
        env=cluster, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    actors = [actor for actor in json.loads(listed.stdout) if "UnitEncoder" in actor["class_name"]]
    (actor, *_) = (actor for actor in actors if actor["state"] == "ALIVE")  # others are of jobs before
    token = (Path(cluster["HOME"]) / ".ray" / "auth_token").read_text().strip()
    address = f"{cluster['RAY_API_SERVER_ADDRESS']}/api/data/datasets/{actor['job_id']}"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        (dataset,) = json.load(answer)["datasets"]
    assert dataset["dataset"].startswith("embed_seen")
    assert any("UnitEncoder" in operator["operator"] for operator in dataset["operators"]), dataset

    wait_until(lambda: "succeeded" in job(cluster, "status", "seen"), 120, told)
    assert "devices" in told()
    for split, name in (("train", "train-*"), ("test", "test-*")):
        (folder,) = (tmp_path / "seen" / "stores").glob(name)
        counts = Store(str(folder)).complete().counts
        assert counts["rejected"] == (90 if split == "train" else 3)
        expected = {"rows": counts["rows"], "tokens": counts["tokens"], "rejects": counts["rejected"]}

        def shown(split=split, names=tuple(expected)):
            found = metrics_of(cluster, "seen")
            return {
                name: sum(value for labels, value in found.get(f"{name}_total", ()) if labels["split"] == split)
                for name in names
            }

        wait_until(lambda shown=shown, expected=expected: shown() == expected, 30, lambda shown=shown: str(shown()))


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
    config["applications"] = []
    deploy()
    wait_until(lambda: not titled_everywhere("ServeReplica:bertray:"), 60)


def test_a_job_that_serves_gives_its_environment_to_its_encoders_and_ends_when_it_is_stopped(cluster, demo):
    """Also where Ray Serve was started by another job, as here by the one before."""
    port, told = free_port(), lambda: job(cluster, "logs", "serving")
    environment = json.dumps({"env_vars": {"BROUGHT_ALONG": "yes"}})
    options = ["--no-wait", "--submission-id", "serving", "--runtime-env-json", environment]
    command = ("jobs/serve.py", f"mood={demo['bundle']}", "--port", port, "--replicas", 1)
    done = submit(cluster, *command, options=options)
    assert done.returncode == 0, done.stdout + done.stderr

    def asked(path="ready", body=None):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", body, timeout=30) as got,
        ):
            return json.load(got)

    wait_until(lambda: asked() is not None, 120, told)
    assert asked("predict", b'{"inputs": "this is great news!"}')[0]["label"] == "positive"
    (encoder,) = titled_everywhere(f"ServeReplica:bertray-{port}:")
    assert b"BROUGHT_ALONG=yes" in Path(f"/proc/{encoder}/environ").read_bytes()
    job(cluster, "stop", "serving")
    wait_until(lambda: not titled_everywhere(f"ServeReplica:bertray-{port}:"), 60, told)
    assert asked() is None


def titled_everywhere(mark):
    """The processes of this machine whose title has a mark in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone at work: with an environment, runs and caches, 3 MB each."""
    folder = tmp_path_factory.mktemp("clone") / "bertray"
    ours = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, folder, ignore=ours)
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", "-C", str(folder), *command], check=True, timeout=30)
    for large in (".git/objects", ".venv/lib", "runs/demo/stores", "bertray/__pycache__", "build", "bertray.egg-info"):
        (folder / large).mkdir(parents=True, exist_ok=True)
        (folder / large / "large").write_bytes(os.urandom(3_000_000))
    return folder


LISTED = """
import json, os
files = [os.path.join(at, file) for at, _, files in os.walk(".") for file in files]
print("FILES", json.dumps({file: os.path.getsize(file) for file in files}))
"""


def test_what_is_uploaded_is_the_code_alone(cluster, clone):
    done = submit(cluster, "-c", LISTED, folder=clone)
    assert done.returncode == 0, done.stdout + done.stderr
    files = json.loads(next(line[6:] for line in done.stdout.splitlines() if line.startswith("FILES")))
    kept = subprocess.run(["git", "-C", str(clone), "ls-files"], capture_output=True, text=True, timeout=30)
    assert {name.removeprefix("./") for name in files} == set(kept.stdout.split())
    assert sum(files.values()) < 5_000_000


def test_the_job_of_kubernetes_runs_from_its_zip(cluster, clone, s3):
    """The commands of the README and of the manifest, with S3 of moto for the bucket and CPUs for GPUs."""
    subprocess.run(
        ["git", "-C", str(clone), "archive", "--prefix", "bertray/", "-o", "bertray.zip", "HEAD"],
        check=True,
        timeout=30,
    )
    Location(f"{s3}/bertray.zip").write((clone / "bertray.zip").read_bytes())
    given = (ROOT / "jobs" / "kubernetes" / "rayjob.yaml").read_text().replace("s3://BUCKET", s3)
    job = yaml.safe_load(given)["spec"]
    folder = yaml.safe_load(job["runtimeEnvYAML"])["working_dir"]
    without = submit(cluster, *job["entrypoint"].split()[1:], folder=folder)
    assert without.returncode == 1
    assert (
        "bertray: ray.device is cuda, but the Ray cluster has no GPU. Set ray.device to auto or cpu." in without.stdout
    )
    done = submit(cluster, *job["entrypoint"].replace("cuda", "cpu").split()[1:], folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(Location(f"{s3}/runs/demo/metrics.json").read())["metrics"]["test"]["accuracy"] > 0.82


def test_without_a_token_the_cluster_refuses(cluster, tmp_path):
    stranger = {**cluster, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    refused = submit(stranger, "jobs/pipeline.py", "jobs/specs/demo.yaml")
    assert refused.returncode != 0
    assert re.search("authentication", refused.stdout + refused.stderr, re.I)


def refused(cluster, output, **environment):
    """What a job that joins the cluster by its address says, in an environment that differs from the cluster's."""
    command = [sys.executable, "-m", "bertray.cli", "embed", "jobs/specs/demo.yaml", "--output", str(output)]
    done = subprocess.run(
        [*command, "--set", f"ray.address={cluster['GCS']}"],
        env=cluster | environment | {"RAY_NUM_REDIS_GET_RETRIES": "2"},  # Ray tries 20 times, a second each
        cwd=ROOT, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert not list(output.rglob("shards/*"))
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"bertray: Cannot use the Ray cluster at {cluster['GCS']}: ")
    return line


def test_another_token_is_told(cluster, tmp_path):
    for environment in ({"RAY_AUTH_TOKEN": "another" * 5}, {"RAY_AUTH_MODE": "disabled"}, {"HOME": str(tmp_path)}):
        line = refused(cluster, tmp_path / "run", **environment)
        assert "token" in line and "RAY_AUTH_MODE=token" in line and "auth_token" in line


VERSION = """
import json, sys
from ray._common.usage import usage_constants as constants
from ray._raylet import GcsClient
cluster = GcsClient(address=sys.argv[1])
found = json.loads(cluster.internal_kv_get(constants.CLUSTER_METADATA_KEY, b"cluster"))
print(found[sys.argv[2]])
found[sys.argv[2]] = sys.argv[3]
cluster.internal_kv_put(constants.CLUSTER_METADATA_KEY, json.dumps(found).encode(), True, b"cluster")
"""


@pytest.mark.parametrize(("kind", "version"), [("ray_version", "2.48.0"), ("python_version", "3.12.3")])
def test_another_version_is_told(cluster, tmp_path, kind, version):
    """The cluster is made to say that it was started with another version."""

    def say(version):
        command = [sys.executable, "-c", VERSION, cluster["GCS"], kind, version]
        done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()

    own = say(version)
    try:
        line = refused(cluster, tmp_path / "run")
    finally:
        assert say(own) == version
    assert re.search(rf"Version mismatch: .*{version}.*{own}.*Install the cluster's versions", line)


@pytest.mark.parametrize("script", ["pipeline", "embed", "fit", "evaluate", "predict", "publish", "serve"])
def test_every_job_is_a_command(script):
    done = subprocess.run(
        [sys.executable, f"jobs/{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"usage: bertray {'run' if script == 'pipeline' else script}" in done.stdout
