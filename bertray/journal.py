"""The log of a run's steps, for machines: one JSON object a line. Knows nothing of what steps do.

Each attempt at a run has a file of its own under `logs/`, whose name begins with when it began, so that they sort: the
log of a run that was resumed is all of them, one after another. A file is written whole at each line, since object
stores cannot append; what a crash leaves is what was known until then, a step without its end.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from bertray.progress import log
from bertray.storage import Location

_ERROR = 500  # characters of an error


class Journal:
    """One attempt's log."""

    def __init__(self, folder: Location, run: str, **facts: Any) -> None:
        """
        Args:
            folder: the run's; run: what the attempt is known by.
            facts: what else its first line tells.
        """
        now = datetime.now(UTC)
        self._lines: list[str] = []
        self._run = run
        self._file = folder / "logs" / f"{now:%Y%m%dT%H%M%S.%f}Z-{run[:8]}.jsonl"
        self._tell(step="run", event="start", host=platform.node(), pid=os.getpid(), **facts)

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """A step: its start, and its end with how it went. What is put into the mapping is told with the end;
        `outcome` is there already."""
        started, facts = time.monotonic(), {"outcome": "done"}
        self._tell(step=name, event="start")
        try:
            yield facts
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            facts["outcome"] = "stopped" if stopped else "failed"
            if not stopped:
                line = " ".join(f"{type(error).__name__}: {error}".split())
                facts["error"] = line.encode(errors="backslashreplace").decode()[:_ERROR]
            raise
        finally:
            self._tell(step=name, event="end", seconds=round(time.monotonic() - started, 3), **facts)

    def _tell(self, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(json.dumps({"time": now, "run": self._run, **facts}, ensure_ascii=False) + "\n")
        try:
            self._file.write("".join(self._lines).encode(), sync=False)
        except OSError as error:  # a disk that is full stops the step itself, if it has to
            log.debug("%s is not written: %s", self._file, error)


def entries(folder: Location) -> Iterator[dict[str, Any]]:
    """All lines of a run's log, the oldest first; damaged ones are left out."""
    for file in (folder / "logs").files():
        with suppress(FileNotFoundError):
            for line in Location(file.url).read().split(b"\n"):
                with suppress(ValueError):
                    yield json.loads(line)
