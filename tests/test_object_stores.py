"""A whole run on an S3 server that answers 500 and breaks connections off now and then, killed on its way."""

import json
import os
import signal
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from chaos import ENVIRONMENT, bertray, find
from conftest import MINILM
from flaky import Flaky
from test_faults import WORDS, ended

from bertray import audit
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
