"""What tests share: one local Ray, the real encoder of the demo, a tiny random one, and one run of the demo."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest
import torch
from machines import HEAD

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels in Triton run without a GPU, slowly

import bertray

ON_MACHINES = "BERTRAY_MACHINES" in os.environ  # in a network that machines.isolated made
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SIX = {
    "im very sad at the whole situation": "negative",
    "i woke up feeling amazing": "positive",
    "theres going to be a full eclipse 2day": "neutral",
    "i wish i could have a different life sometimes. it gets hard": "negative",
    "this is great news!": "positive",
    "I just got a raise :o": "positive",
}


@pytest.fixture(scope="session")
def ray_cluster():
    """A real local Ray of 2 CPUs, started once."""
    import ray

    from bertray.cluster import connected
    from bertray.spec import RaySizes

    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with connected(RaySizes()):
        yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared():
    """Real data sets that lie beside the project on the machines of its developers."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: real data sets are not part of the project")
    return SHARED


@pytest.fixture(scope="session")
def minilm():
    from bertray.checkpoints import find

    return find(MINILM)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, minilm):
    """A random BERT of 2 layers, 32 wide, with MiniLM's tokenizer: for what does not depend on sense."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm.folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory, ray_cluster):
    """The demo, run once: its summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return bertray.run("jobs/specs/demo.yaml", overrides=[f"output={tmp_path_factory.mktemp('demo')}"])


def topics_of(bundle):
    """A bundle that gives texts several labels, made by hand from one that gives one."""
    from dataclasses import replace

    import numpy as np

    from bertray.heads import LinearHead

    weight = np.random.default_rng(0).standard_normal((4, bundle.head.weight.shape[1])).astype(np.float32)
    head = LinearHead(weight, np.zeros(4, np.float32))
    labels = ("family", "health", "travel", "work")
    return replace(bundle, problem="multi_label", labels=labels, head=head, threshold=0.0, fingerprint="topics")


def bytes_read():
    """How many bytes this process has read so far, from wherever."""
    told = Path("/proc/self/io")
    if not told.exists():
        pytest.skip("only Linux tells how many bytes a process has read")
    return int(told.read_text().split()[1])


def free_port():
    """A port of loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(*arguments, environment=None):
    """`bertray serve` as a process of its own: its address."""
    port = free_port()
    command = [sys.executable, "-m", "bertray.cli", "serve", *map(str, arguments), "--port", str(port)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    lines = []

    def read():
        lines.extend(process.stdout)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{address}/ready"), 90, lambda: "".join(lines), process)
        yield SimpleNamespace(address=address, process=process, lines=lines)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def wait_until(is_true, seconds, told=lambda: "", process=None):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end and (process is None or process.poll() is None), told()
        time.sleep(0.05)


@pytest.fixture(scope="session")
def service(demo, tmp_path_factory):
    """`bertray serve` of the demo's head `mood` and a head `topics` with several labels, as a process of its own.

    address: where it answers; folder: that heads may be put from, with bundles mood/head, topics/head and other/head
    (of the same labels as mood, with other answers).
    """
    from dataclasses import replace

    from bertray import bundle as bundles
    from bertray.heads import LinearHead

    folder = tmp_path_factory.mktemp("heads")
    mood = bundles.load(demo["bundle"])
    other = LinearHead(-mood.head.weight, -mood.head.bias)
    for name, bundle in (
        ("mood", mood),
        ("topics", topics_of(mood)),
        ("other", replace(mood, head=other, fingerprint="other")),
    ):
        bundles.save(bundle, str(folder / name / "head"))
    with serving(folder / "mood" / "head", folder / "topics" / "head", "--heads", folder) as running:
        running.folder = folder
        yield running


@pytest.fixture(scope="session")
def s3():
    """A real S3 server on loopback, or where machines reach it, with a bucket `box`."""
    import boto3
    from moto.server import ThreadedMotoServer

    host, port = HEAD if ON_MACHINES else "127.0.0.1", free_port()
    server = ThreadedMotoServer(ip_address=host, port=port, verbose=False)
    server.start()
    settings = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="box")
        yield "s3://box"
    server.stop()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, and a function that makes room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def rows_file(tmp_path):
    """A function that writes rows as JSON Lines and gives the file's path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def demo_rows(split):
    with (ROOT / "jobs" / "data" / f"demo-{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def with_vectors(rows, vectors, names=("mean_6",)):
    """A table with vectors, as a store's shards hold them."""
    from bertray import vectors as columns

    return columns.with_vectors(rows, SimpleNamespace(vectors=vectors), names)
