"""The benchmark of serving: a small real run under wrk, a short soak, and what they count with."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from benchmarks import load, processes, soak
from benchmarks.load import Target, Texts
from benchmarks.wire import Connection

needs_wrk = pytest.mark.skipif(load.missing(), reason=load.INSTALL)


def run(*arguments, limit=590):
    command = [sys.executable, "-m", "benchmarks.serve", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def tables(markdown):
    """The cells of each row of each table, by its first column."""
    found = {}
    for line in markdown.splitlines():
        if line.startswith("|") and not line.startswith("|-"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(cells[0], []).append(cells[1:])
    return found


@pytest.fixture
def echo():
    """A server that keeps what it is sent, is slow every twentieth time, and breaks on "break" with an even number."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            if len(seen) % 20 == 0:
                time.sleep(0.1)
            self.send_response(500 if re.fullmatch(r"break \d*[02468]", str(body.get("inputs"))) else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", seen
    server.shutdown()
    server.server_close()


@needs_wrk
def test_no_text_is_sent_twice(echo, tmp_path):
    url, seen = echo
    texts = Texts(['a "quoted" text', "another, naïve\n", "a third"], tmp_path / "texts")
    one = texts.send(Target(url), 1, 1)
    texts.send(Target(url, "input", ', "model": "x"'), 2, 1, texts=3)
    assert one.requests > 5
    assert one.failed == 0
    lists = [body for body in seen if "input" in body]
    assert {body["model"] for body in lists} == {"x"}
    assert {len(body["input"]) for body in lists} == {3}
    sent = [body["inputs"] for body in seen if "inputs" in body] + [text for body in lists for text in body["input"]]
    sent += texts.take(3)
    assert len(set(sent)) == len(sent)
    assert {text.rpartition(" ")[0] for text in sent} == {'a "quoted" text', "another, naïve\n", "a third"}


@needs_wrk
def test_a_rate_is_kept_and_slow_answers_are_seen(echo, tmp_path):
    url, _ = echo
    found = Texts(["a"], tmp_path / "texts").send(Target(url), 32, 3, rate=50)
    assert 30 < found.rate < 70
    assert found.p99 > 90
    assert found.missed < 0.5
    assert found.failed == 0


@needs_wrk
def test_errors_are_counted_and_are_no_answers(echo, tmp_path):
    url, _ = echo
    found = Texts(["break"], tmp_path / "texts").send(Target(url), 1, 1)
    assert abs(found.refused - found.requests / 2) <= 1
    assert found.rate == pytest.approx((found.requests - found.refused) / 1, rel=0.2)


@needs_wrk
@pytest.mark.timeout(600)
def test_services_side_by_side():
    printed, said = run("--seconds", "1", "--rounds", "1", "--only", "bertray", "fastapi", "infinity")
    found = tables(printed)
    assert "infinity, vectors is left out: no environment with it was given" in printed
    if len(found["bertray serve"]) < 5 or "plain FastAPI" not in found:
        pytest.skip(f"too slow a machine to measure: {said[-500:]}")
    assert len(found["plain FastAPI"]) == 5  # a row for each kind of load, and one on answers
    requests, errors, lost, differs = found["bertray serve"][-1]
    assert int(requests.replace(",", "")) > 10
    assert (errors, lost) == ("0", "0")
    assert float(differs.split()[0]) < 0.03
    assert re.search(r"\| requests of 32 texts: share of the bare engine +\| +at least 70 % +\| +\d+%", printed)


@pytest.mark.timeout(600)
def test_a_short_soak():
    printed, said = run("--rounds", "0", "--soak", "0.4")
    right, wrong, old, _, lost = (int(cell.replace(",", "")) for cell in tables(printed)["all"][0])
    assert right > 50
    assert (wrong, old, lost) == (0, 0, 0), said
    assert said.count("was killed") == 2
    assert int(re.search(r"swapped (\d+) times", printed)[1]) > 1


def test_versions_that_an_answer_may_be_of():
    versions = soak.Versions()
    versions.bundles[2] = "b"
    versions.expect(2)
    assert versions.order[versions.acknowledged :] == [1, 2]  # it is being put
    versions.acknowledge(2)
    assert versions.order[versions.acknowledged :] == [2]
    versions.expect(1)
    versions.acknowledge(1)
    assert versions.served == 1


def test_a_wire_tells_answers_and_breaks(echo):
    url, _ = echo
    port = int(url.rsplit(":", 1)[1].strip("/"))

    async def ask():
        wire = Connection(port)
        first = await wire.ask("POST", "/", b'{"inputs": "a"}', 5)
        again = await wire.ask("POST", "/", b'{"inputs": "break 2"}', 5)
        wire.close()
        with pytest.raises(OSError):
            await Connection(1).ask("GET", "/", b"", 5)
        return first[0], first[2], again[0]

    assert asyncio.run(ask()) == (200, b"{}", 500)


def test_all_that_a_command_started_is_ended(tmp_path):
    shell = shutil.which("sh")
    log = tmp_path / "log"
    process = processes.start([shell, "-c", "setsid sleep 300 & sleep 300"], tmp_path, {"PATH": "/usr/bin:/bin"}, log)
    deadline = time.monotonic() + 10
    while len(found := processes.titled(process.pid, "sleep")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(processes.memory(one) > 0 for one in [process.pid, *found])
    processes.stop(process, patience=2)
    assert not [pid for pid in found if processes._born(pid)]
