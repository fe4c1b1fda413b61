"""Progress: a bar on a terminal, plain log lines elsewhere. Knows nothing of what is counted."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger("bertray")
_LOG_SECONDS = 5.0


class Progress:
    """Counts up to a total with rate and ETA, on stderr."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            unit=f" {unit}",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )
        self._title, self._unit, self._total, self._done, self._first = title, unit, total, done, done
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, count: int, note: str = "") -> None:
        """Count on; `note` is shown behind the rate."""
        self._done += count
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and (now - self._logged > _LOG_SECONDS or self._done >= self._total):
            self._logged = now
            rate = (self._done - self._first) / max(now - self._started, 1e-9)
            eta = tqdm.format_interval((self._total - self._done) / max(rate, 1e-9))
            log.info(
                "%s: %d of %d %s, %.0f %s/s, ETA %s%s",
                self._title,
                self._done,
                self._total,
                self._unit,
                rate,
                self._unit,
                eta,
                f", {note}" if note else "",
            )
