"""Contestants: all that is measured, each in a process of its own, so that imports, memory and threads do not mix.

A process answers every line of JSON on its standard input by one on its standard output.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks import machine, peers
from bertray import spec
from bertray.checkpoints import find
from bertray.errors import BertrayError

REFERENCE = "reference"
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """What all contestants are given: a checkpoint's folder, a device, CPU threads, and named lists of texts."""

    folder: str
    device: str
    threads: int
    texts: dict[str, list[str]]


class Engine:
    """bertray's own encoder, as a peer."""

    sizes = ()
    size = 0

    def __init__(self, folder: Path, device: str, threads: int, precision: str) -> None:
        from bertray.encoder import Encoder

        chosen = spec.Encoder(pooling="mean", precision=precision)  # type: ignore[arg-type]
        self._encoder = Encoder(find(str(folder)), chosen, device, threads)
        self.fed = 0

    @property
    def precision(self) -> str:
        return str(self._encoder.backend.precision)

    @property
    def backend(self) -> str:
        return str(self._encoder.backend.name)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        encoded = self._encoder.encode(texts)
        self.fed = int(encoded.tokens.sum())  # nothing is padded
        return encoded.vectors


def names() -> list[str]:
    """All contestants: the peers, then bertray in each precision that a spec may ask for."""
    return [*peers.PEERS, *(f"bertray-{precision}" for precision in precisions())]


def precisions() -> tuple[str, ...]:
    return get_args(spec.Encoder.model_fields["precision"].annotation)


def make(name: str, job: Job) -> Any:
    folder = Path(job.folder)
    if name == REFERENCE:  # one text at a time: what every other is held against
        return peers.Notebook(folder, job.device, job.threads, size=1)
    if name in peers.PEERS:
        return peers.PEERS[name](folder, job.device, job.threads)
    return Engine(folder, job.device, job.threads, name.removeprefix("bertray-"))


def serve(name: str, job: Job) -> None:
    """Be a contestant until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like; answers go where none of them writes
    try:
        peer = make(name, job)
    except (ImportError, BertrayError, peers.UnavailableError, peers.exports.ExportError) as error:
        hint = " (pip install 'bertray[bench]')" if isinstance(error, ImportError) else ""
        print(json.dumps({"skip": " ".join(str(error).split()) + hint}), file=answers)
        return
    print(json.dumps({}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_answer(peer, job, **json.loads(line))), file=answers)


def _answer(peer: Any, job: Job, texts: str, step: int = 1, save: str = "") -> dict[str, Any]:
    """Encode the texts of that name. With `save`, as a first time: settle on a size of batches before, and write
    every so many-th vector to that file after."""
    if save:
        peers.tune(peer, job.texts[texts])
    started = time.perf_counter()
    vectors = peer(job.texts[texts])
    seconds = time.perf_counter() - started
    if save:
        np.save(save, np.asarray(vectors, np.float32)[::step])
    return {
        "seconds": seconds,
        "fed": peer.fed,
        "precision": peer.precision,
        "setup": getattr(peer, "backend", f"batches of {peer.size}"),
        "memory": machine.peak_memory(job.device),
    }


class SkippedError(Exception):
    """A contestant cannot take part; says why in one line."""


class Contestant:
    """A contestant's process, seen from outside. It is stopped whenever it is not its turn, so that no thread of it
    spins while another is timed."""

    def __init__(self, name: str, job: Job) -> None:
        """Start it and wait until it is ready.

        Raises:
            SkippedError: it cannot take part here.
        """
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  close() closes it
        threads = {key: str(job.threads) for key in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.engine", "--contestant", name],
            cwd=_ROOT,
            env=os.environ | threads | {"TOKENIZERS_PARALLELISM": "true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            answer = self._ask(json.dumps(asdict(job)))
        except SkippedError:
            self.close()
            raise
        if "skip" in answer:
            self.close()
            raise SkippedError(answer["skip"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def encode(self, texts: str, step: int = 1, save: str = "") -> dict[str, Any]:
        """Encode the texts of that name: what `_answer` gives."""
        self._process.send_signal(signal.SIGCONT)
        return self._ask(json.dumps({"texts": texts, "step": step, "save": save}))

    def _ask(self, line: str) -> dict[str, Any]:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._log.seek(0)
            raise SkippedError((self._log.read().strip().splitlines() or ["it was killed"])[-1])
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
