"""Progress: a bar on a terminal, plain log lines elsewhere. Knows nothing of what is counted."""

import logging
import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger("bertray")
# Set by Ctrl-C: Ray's core at times takes a KeyboardInterrupt for itself, and whatever runs would run on.
interrupted = threading.Event()
_LOG_SECONDS = 5.0


class Progress:
    """Counts up to a total with rate and ETA, on stderr. A total of 0 is one that is not known."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(
            total=total or None,
            initial=done,
            desc=title,
            unit=f" {unit}",
            dynamic_ncols=True,
            disable=self._plain,
            file=sys.stderr,
        )
        self._title, self._unit, self._total = title, unit, total
        self._first = self._done = self._told = done
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._plain and self._done > self._told:
            self._tell("")

    def add(self, count: int, note: str = "") -> None:
        """Count on; `note` is shown behind the rate.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, and nobody has heeded it.
        """
        if interrupted.is_set():
            raise KeyboardInterrupt
        self._done += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        if self._plain and (time.monotonic() - self._logged > _LOG_SECONDS or self._done == self._total):
            self._tell(note)

    def _tell(self, note: str) -> None:
        self._logged, self._told = time.monotonic(), self._done
        rate = (self._done - self._first) / max(self._logged - self._started, 1e-9)
        parts = [f"{rate:.0f} {self._unit}/s"]
        if self._total:
            parts.append(f"ETA {tqdm.format_interval((self._total - self._done) / max(rate, 1e-9))}")
        of_total = f" of {self._total}" if self._total else ""
        log.info(
            "%s: %d%s %s, %s",
            self._title,
            self._done,
            of_total,
            self._unit,
            ", ".join([*parts, note] if note else parts),
        )
