"""Services that answer over HTTP, each in processes of its own: started, waited for, judged by its answers, ended."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import processes
from benchmarks.contestants import SkippedError
from benchmarks.load import Target

ROOT = Path(__file__).resolve().parents[1]
BERTRAY, RAY, FASTAPI = "bertray serve", "plain Ray Serve", "plain FastAPI"
INFINITY, BERTRAY_VECTORS = "infinity, vectors", "bertray serve, vectors"
NAMES = {"bertray": BERTRAY, "ray": RAY, "fastapi": FASTAPI, "vectors": BERTRAY_VECTORS, "infinity": INFINITY}
_PATIENCE = 180  # seconds until a service has to answer
_TOLERANCE = 0.05  # of scores, and of the cosine: more is another answer and not another precision


@dataclass(frozen=True)
class Expected:
    """Texts with what bertray answers to them in Python: label -> score for each, and normalized vectors."""

    texts: list[str]
    scores: list[dict[str, float]]
    vectors: NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """What all services are given. bundle: folder of the head; encoder: folder of the model; precision: of the plain
    ones; infinity: environment that infinity is installed in; scratch: folder for their logs."""

    bundle: str
    encoder: str
    precision: str
    infinity: str
    scratch: Path


class Running:
    """A service that answers."""

    def __init__(self, name: str, url: str, pid: int) -> None:
        self.name, self.pid, self._url = name, pid, url
        self.target = Target(f"{url}/predict")
        if name in (INFINITY, BERTRAY_VECTORS):
            version = "" if name == INFINITY else "/v1"
            model = json.dumps(call(f"{url}{version}/models")["data"][0]["id"])
            self.target = Target(f"{url}{version}/embeddings", "input", f', "model": {model}')

    def difference(self, expected: Expected) -> float:
        """The most by which scores, or one less the cosine of vectors, differ from what is expected, asked for one by
        one and all at once.

        Raises:
            SkippedError: it answers something else.
        """
        found = [self._ask(text) for text in expected.texts]
        together = self._ask(expected.texts)
        if self.target.key == "input":
            both = np.asarray([*(one[0] for one in found), *together])
            both /= np.linalg.norm(both, axis=1, keepdims=True)
            most = float(1 - (both * np.tile(expected.vectors, (2, 1))).sum(1).min())
        else:
            rows = zip([*found, *together], expected.scores * 2, strict=True)
            most = max(abs(one["score"] - wanted[one["label"]]) for row, wanted in rows for one in row)
        if not most < _TOLERANCE:
            raise SkippedError(f"it answers otherwise than bertray in Python, by {most:.2g}")
        return most

    def settle(self) -> None:
        """Wait until it has worked off what it was sent, also for those that did not wait for their answers."""
        self._ask("a plain text")

    def _ask(self, texts: str | list[str]) -> Any:
        body = json.loads(f'{{"{self.target.key}": {json.dumps(texts)}{self.target.rest}}}')
        answer = call(self.target.url, body)
        return [one["embedding"] for one in answer["data"]] if self.target.key == "input" else answer


def call(url: str, body: Any = None, method: str | None = None) -> Any:
    """What a service answers.

    Raises:
        OSError: it does not answer, or with an error.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@contextmanager
def running(name: str, setting: Setting) -> Iterator[Running]:
    """One of the contestants, from when it answers.

    Raises:
        SkippedError: it does not come up; says why.
    """
    port = free_port()
    with started(name, _COMMANDS[name](setting, port), port, setting.scratch) as process:
        yield Running(name, f"http://127.0.0.1:{port}", process.pid)


@contextmanager
def started(name: str, command: Sequence[str], port: int, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command's process, from when something answers at the port and is ready.

    Raises:
        SkippedError: it ends before, or is not ready in time.
    """
    log = scratch / f"{name.replace(' ', '-')}.log"
    process = processes.start(command, ROOT, _environment(), log)
    try:
        _await(process, f"http://127.0.0.1:{port}", log)
        yield process
    finally:
        processes.stop(process)


def _environment() -> dict[str, str]:
    """That of this process, without a Ray cluster that it may be joined to, on CPUs alone, offline."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _await(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if _ready(url):
            return
        time.sleep(0.2)
    told = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise SkippedError(f"it is not ready: {(told or ['it says nothing'])[-1][:200]}")


def _ready(url: str) -> bool:
    """Whether it says so; one that has no word for that is, once it is well."""
    for path in ("ready", "health"):
        try:
            call(f"{url}/{path}")
            return True
        except urllib.error.HTTPError as error:
            if error.code != 404:
                return False
        except (OSError, ValueError):
            return False
    return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def bertray_command(bundles: Sequence[str], port: int, *options: str) -> list[str]:
    """The command that serves bundles."""
    return [sys.executable, "-m", "bertray.cli", "serve", *bundles, "--port", str(port), *options]


def _plain(app: str) -> Callable[[Setting, int], list[str]]:
    def command(setting: Setting, port: int) -> list[str]:
        given = json.dumps({"folder": setting.bundle, "precision": setting.precision, "port": port})
        return [sys.executable, "-m", "benchmarks.serve", "--app", app, "--given", given]

    return command


def _infinity(setting: Setting, port: int) -> list[str]:
    if not setting.infinity:
        raise SkippedError("no environment with it was given (--infinity FOLDER)")
    program = Path(setting.infinity) / "bin" / "infinity_emb"
    if not program.exists():
        raise SkippedError(f"there is no {program}")
    command = [str(program), "v2", "--model-id", setting.encoder, "--engine", "torch", "--device", "cpu"]
    return [*command, "--no-bettertransformer", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]


def _bertray(setting: Setting, port: int) -> list[str]:
    return bertray_command([setting.bundle], port)


_COMMANDS: dict[str, Callable[[Setting, int], list[str]]] = {
    BERTRAY: _bertray,
    RAY: _plain("ray"),
    FASTAPI: _plain("fastapi"),
    BERTRAY_VECTORS: _bertray,
    INFINITY: _infinity,
}
