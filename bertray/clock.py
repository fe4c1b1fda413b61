"""Where the time of encoder processes goes, and what it costs. Knows nothing of what they do.

Of the time that a process holds its device, from its first line to its last receipt:

    start      until it was ready: modules imported, weights loaded
    encode     in which at least one pack was going through the layers
    idle       the rest: nothing was being encoded

These add up to the whole. Beside them, each in threads of its own, in which at least one of the process was busy with:

    read       reading rows (waiting for storage too)
    tokenize   making tokens of texts
    write      making shards and writing them

No receipt tells of a process's time behind its last one: of waiting for units that others encode, or of what a process
that ended had begun.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock
from typing import Any

HELD = ("start", "encode", "idle")  # these add up to the time that devices were held
BESIDE = ("read", "tokenize", "write")


class Stopwatch:
    """Seconds in which at least one thread was at something: what several do at once counts once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seconds, self._running, self._since = 0.0, 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._seconds += time.perf_counter() - self._since

    def add(self, seconds: float) -> None:
        """Count what was measured elsewhere."""
        with self._lock:
            self._seconds += seconds

    @property
    def seconds(self) -> float:
        """So far, what is running included."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._since if self._running else 0.0)


class Clock:
    """The time of one process, told in parts: what is told in one is not told again."""

    def __init__(self, share: float = 1.0) -> None:
        """
        Args:
            share: of its device that the process holds: less than 1 where several share one.
        """
        self._lock, self._begun = Lock(), time.perf_counter()
        self._share, self._start = share, 0.0
        self._watches: dict[str, Stopwatch] = {}
        self._told: dict[str, float] = {}

    def ready(self, **watches: Stopwatch) -> None:
        """The process has started; what its watches have seen so far belongs to that.

        Args:
            watches: of encode, read, tokenize and write.
        """
        self._start, self._watches = time.perf_counter() - self._begun, watches
        self._told = {name: watch.seconds for name, watch in watches.items()}
        self._told["idle"] = -self._told["encode"]

    def now(self) -> dict[str, float]:
        """Seconds so far by name; those of watches count from when they were made."""
        seconds = {name: watch.seconds for name, watch in self._watches.items()}
        held = time.perf_counter() - self._begun
        return {"start": self._start, **seconds, "idle": held - self._start - seconds["encode"]}

    def untold(self) -> dict[str, float]:
        """Seconds by name since this was asked last, without what is none. On CUDA encoding shows when a block ends, so
        that a part may have less than no idle time: the sum is right."""
        with self._lock:
            now = self.now()
            parts = {name: round(seconds - self._told.get(name, 0.0), 3) for name, seconds in now.items()}
            for name, part in parts.items():  # what rounding left out is told the next time
                self._told[name] = self._told.get(name, 0.0) + part
        if self._share < 1:
            parts["device"] = round(self._share * _held(parts), 3)
        return {name: seconds for name, seconds in parts.items() if seconds}


def account(parts: Iterable[Mapping[str, float]], price: float = 0.0) -> dict[str, Any]:
    """What all parts come to.

    Args:
        parts: seconds by name, as clocks told them; empty ones (of receipts of before) are not known.
        price: of a device for an hour; 0 is not known.

    Returns:
        seconds: of processes, by name; shares: of start, encode and idle, which add up to 1; device_hours: of devices,
        which several processes may share; and where a price is known price and cost. Empty where nothing is known.
    """
    seconds, devices = dict.fromkeys((*HELD, *BESIDE), 0.0), 0.0
    for part in parts:
        devices += part.get("device", _held(part))
        for name in seconds:
            seconds[name] += part.get(name, 0.0)
    held = _held(seconds)
    if held <= 0:
        return {}
    return {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "shares": {name: round(seconds[name] / held, 4) for name in HELD},
        "device_hours": round(devices / 3600, 6),
        **({"price": price, "cost": round(devices / 3600 * price, 6)} if price else {}),
    }


def lines(account: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """An account in words: a title and what there is to say, for each line."""
    if not account:
        return
    seconds, shares = account["seconds"], account["shares"]
    held = ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in ("encode", "idle", "start"))
    beside = ", ".join(f"{name} {_number(seconds[name])} s" for name in BESIDE)
    yield "devices", f"{_number(_held(seconds))} s: {held}; beside that {beside}"
    if "cost" in account:
        hours, price = _number(account["device_hours"]), account["price"]
        yield "cost", f"{_number(account['cost'])} ({hours} device-hours at {price:g})"


def _held(part: Mapping[str, float]) -> float:
    return sum(part.get(name, 0.0) for name in HELD)


def _number(value: float) -> str:
    """With two digits behind the point, or of less than 1 two that say something."""
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.2g}"
