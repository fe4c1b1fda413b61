"""Whole runs on an S3 server: one that answers 500 and breaks connections off now and then, killed on its way; one with
its encoder there."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest
from chaos import ENVIRONMENT, bertray, find
from conftest import MINILM, SIX, demo_rows, serving
from flaky import Flaky
from handmade import heads_of_every_kind
from test_faults import WORDS, ended

from bertray import audit, load
from bertray import bundle as bundles
from bertray.errors import BundleError
from bertray.storage import Location
from bertray.store import Store

ROWS = 1_200


@pytest.fixture
def rows():
    return "".join(
        json.dumps({"id": f"r{i}", "text": f"{i} {WORDS if i % 3 else 'short'}", "label": i % 2}) + "\n"
        for i in range(ROWS)
    )


@pytest.fixture
def flaky(s3, monkeypatch):
    """The S3 server behind a proxy that harms 4 % of all requests."""
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    server = Flaky((address.hostname, address.port), share=0.04)
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    for name in names:
        monkeypatch.setitem(ENVIRONMENT, name, os.environ[name])
    monkeypatch.setitem(ENVIRONMENT, "AWS_ENDPOINT_URL", server.url)
    yield server
    server.shutdown()


def spec(folder, source, output, **parts):
    path = folder / f"{output.rsplit('/', 1)[-1]}.json"
    data = {"train": source, "test": source, "id": "id", "unit_rows": 60}
    encoder = {"model": MINILM, "pooling": "mean"}
    path.write_text(
        json.dumps({"data": data, "encoder": encoder, "ray": {"address": "local"}, "output": output} | parts)
    )
    return path


def contents(run):
    found = {}
    for name in (Location(run) / "stores").folders():
        store = Store((Location(run) / "stores" / name).url)
        vectors, _ = store.load()
        ids = [one for table in store.tables(["id"]) for one in table["id"].to_pylist()]
        found[name.split("-")[0]] = ids, vectors
    return found


@pytest.mark.timeout(400)
def test_a_run_on_an_unreliable_store_that_is_killed_and_goes_on(rows, s3, flaky, tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows)
    (Location(s3) / "chaos/rows.jsonl").write(rows.encode())
    code, _, errors = ended(bertray("embed", spec(tmp_path, str(tmp_path / "rows.jsonl"), str(tmp_path / "plain"))))
    assert code == 0, errors

    file, output = spec(tmp_path, f"{s3}/chaos/rows.jsonl", f"{s3}/chaos/run"), f"{s3}/chaos/run"
    process = bertray("embed", file)
    deadline = time.monotonic() + 100
    while sum("/shards/" in f"/{each.name}" for each in Location(output).files()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(find(process.pid, "driver"), signal.SIGKILL)
    assert ended(process)[0] != 0
    assert not any(each.name.endswith("manifest.json") for each in Location(output).files())

    code, answer, errors = ended(bertray("run", file, "--json"), 250)
    assert code == 0, errors
    assert "rows are done already" in errors
    assert "Traceback" not in errors
    summary = json.loads(answer)
    assert summary["rows"]["train"]["rows"] == summary["metrics"]["test"]["rows"] == ROWS
    assert flaky.requests > 100
    assert all(flaky.harm.values()), flaky.harm

    plain, stored = contents(str(tmp_path / "plain")), contents(output)
    for split in ("train", "test"):
        assert stored[split][0] == plain[split][0] == [f"r{i}" for i in range(ROWS)]
        assert np.array_equal(stored[split][1], plain[split][1])
    assert audit.verify(output)["ok"]
    assert audit.status(output)["report"]
    assert (Location(output) / "predictions/test.parquet").exists()


def test_a_store_that_is_gone_for_good_is_one_line(rows, s3, tmp_path, monkeypatch):
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
    for name in names:
        monkeypatch.setitem(ENVIRONMENT, name, os.environ[name])
    (tmp_path / "rows.jsonl").write_text(rows)
    file = spec(tmp_path, str(tmp_path / "rows.jsonl"), "s3://no-such-bucket/run")
    code, _, errors = ended(bertray("embed", file))
    assert code == 2
    assert "no-such-bucket" in errors
    assert len(errors.strip().splitlines()) == 1


CLUSTER = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
print("AT", cluster.address, flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture
def node(s3, tmp_path, monkeypatch):
    """The address of a cluster whose one node has a cache of its own, beside that of the commands, and what the S3
    server is asked for."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    server = Flaky((address.hostname, address.port), share=0.0)
    for name, value in {**{name: os.environ[name] for name in names}, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / "node")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    monkeypatch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "driver"))
    yield next(line.split()[1] for line in process.stdout if line.startswith("AT")), server.asked
    process.communicate("\n", timeout=60)
    server.shutdown()


def parts(asked):
    """How often each part of each of the encoder's objects was asked for."""
    return Counter(
        (path, part) for command, path, part in asked if command == "GET" and path.startswith("/box/minilm/")
    )


def test_an_encoder_in_a_store_reaches_each_node_once(s3, node, minilm, rows, tmp_path):
    address, asked = node
    url = f"{s3}/minilm"
    for file in minilm.folder.glob("*.*"):
        (Location(url) / file.name).write(file.read_bytes())
    (tmp_path / "rows.jsonl").write_text("".join(rows.splitlines(keepends=True)[:240]))

    def run(command, name, model):
        sizes = {"address": address, "workers": 2, "cpus_per_worker": 1}
        encoder = {"model": model, "pooling": "mean", "precision": "fp32"}
        file = spec(tmp_path, str(tmp_path / "rows.jsonl"), str(tmp_path / name), ray=sizes, encoder=encoder)
        code, answer, errors = ended(bertray(command, file, "--json"))
        assert code == 0, errors
        return json.loads(answer), errors

    _, errors = run("embed", "stored", url)
    assert "on 2 cpu worker(s)" in errors
    assert {path.rpartition("/")[2] for path, _ in parts(asked)} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert sum(path.endswith("model.safetensors") for path, _ in parts(asked)) > 1  # a large one comes in parts
    assert set(parts(asked).values()) == {2}  # by the command, and by the node, whose two encoders want it at once

    run("embed", "local", str(minilm.folder))
    plain, made = contents(str(tmp_path / "local")), contents(str(tmp_path / "stored"))
    for split in ("train", "test"):
        assert made[split][0] == plain[split][0]
        assert np.array_equal(made[split][1], plain[split][1])

    asked.clear()
    assert "embedding: done already" in run("embed", "local", url)[1]  # the content has a fingerprint, not the place
    assert asked
    assert not parts(asked)


def test_a_bundle_whose_encoder_is_in_a_store_where_there_is_no_copy_yet(s3, minilm, tmp_path, monkeypatch):
    url = f"{s3}/elsewhere/minilm"
    for file in minilm.folder.glob("*.*"):
        (Location(url) / file.name).write(file.read_bytes())
    heads_of_every_kind(tmp_path, demo_rows("train")[:90])
    mood, stored = bundles.load(str(tmp_path / "mood/head")), str(tmp_path / "stored")
    bundles.save(replace(mood, encoder=mood.encoder | {"model": url, "revision": "0123456789abcdef"}), stored)
    expected, _ = load(str(tmp_path / "mood/head")).predict(list(SIX))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reader"))
    assert load(stored).predict(list(SIX))[0] == expected
    with serving(stored, environment={"XDG_CACHE_HOME": str(tmp_path / "server")}) as running:
        assert predicted(running.address, list(SIX)) == list(expected)
        assert len(list((tmp_path / "server/bertray/models").glob("minilm-*"))) == 1
    (Location(url) / "config.json").write((minilm.folder / "config.json").read_bytes() + b" ")
    with pytest.raises(BundleError, match=f"The config of {url} in .* is not what the bundle was fitted on. Get it as"):
        load(stored)


def predicted(address, texts):
    request = urllib.request.Request(f"{address}/predict", json.dumps({"inputs": texts}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return [one[0]["label"] for one in json.loads(answer.read())]
