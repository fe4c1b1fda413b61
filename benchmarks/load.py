"""Load on a service, made by wrk: a program outside of Python, which counts and times."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = Path(__file__).with_name("load.lua")
_TIMEOUT = 10  # seconds until a request counts as lost
INSTALL = "wrk is not there: apt install wrk (Debian, Ubuntu) or brew install wrk (macOS)."


@dataclass(frozen=True)
class Target:
    """Where requests go, and what their bodies look like. rest: what follows the texts in the body, as JSON."""

    url: str
    key: str = "inputs"
    rest: str = ""


@dataclass(frozen=True)
class Outcome:
    """What wrk saw of one kind of load. Times are in milliseconds.

    requests: how many were answered; rate: well answered requests a second; refused: answers of 400 and above; lost:
    connections that broke, requests without an answer in time; missed: the share of requests that went out over 5 ms
    after they were due (with a rate alone).
    """

    requests: int
    rate: float
    median: float
    p99: float
    most: float
    refused: int
    lost: int
    missed: float

    @property
    def failed(self) -> int:
        return self.refused + self.lost


class Texts:
    """Texts for any number of requests, none of them twice: each gets the next number behind it."""

    def __init__(self, texts: Sequence[str], file: Path) -> None:
        self._texts, self._file, self._next = texts, file, 0
        file.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")

    def take(self, count: int) -> list[str]:
        """So many of them."""
        first = self._advance(count)
        return [f"{self._texts[n % len(self._texts)]} {n}" for n in range(first + 1, first + count + 1)]

    def send(self, target: Target, connections: int, seconds: float, texts: int = 0, rate: float = 0) -> Outcome:
        """Load a service with new texts for some seconds.

        Args:
            texts: a list of so many in each request; 0: a single one.
            rate: requests a second, due at random moments; 0: each connection sends as soon as it is answered.
        """
        first = self._advance(0)
        command = [
            "wrk",
            "--threads",
            "1",
            "--connections",
            str(connections),
            "--duration",
            f"{max(1, round(seconds))}s",
        ]
        command += ["--timeout", f"{_TIMEOUT}s", "--script", str(_SCRIPT), target.url, "--", str(self._file)]
        command += [target.key, target.rest, str(texts), str(first), str(rate)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"wrk failed: {' '.join((done.stderr or done.stdout).split())[:300]}")
        found = json.loads(done.stdout.splitlines()[-1])
        measured = found.pop("seconds")
        self._advance((found["requests"] + 2 * connections) * max(1, texts))  # some were sent and not answered any more
        return Outcome(rate=(found["requests"] - found["refused"]) / measured, **found)

    def _advance(self, count: int) -> int:
        first, self._next = self._next, self._next + count
        return first


def missing() -> bool:
    """Whether wrk is not installed."""
    return shutil.which("wrk") is None
