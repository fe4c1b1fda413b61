"""Metrics of encoder processes for Prometheus, through the agent that a Ray cluster has on each node. Knows nothing of
how they encode.

A node shows them at its metrics port: `ray_bertray_rows_total`, `ray_bertray_tokens_total`, `ray_bertray_rejects_total`
(counters, by run and split), `ray_bertray_token_budget`, `ray_bertray_idle_share` and `ray_bertray_mfu` (gauges, by run
and device), each with Ray's own tags of node and process.
"""

import time
from collections.abc import Mapping

from bertray.rates import peak

_LEAST_SECONDS = 5.0  # that a share is taken over, but for the first
_MOST_SECONDS = 300.0  # that a unit may take, which counts when it is done, before nothing is taken for idle


class Meters:
    """What one encoder process has done, and how busy its device is."""

    def __init__(self, run: str, device: str, model: str = "", shown: bool = True) -> None:
        """
        Args:
            device: what its metrics call it, such as `cuda:0`; model: its name as torch tells it, empty for CPUs.
            shown: whether there is an agent to tell; without one nothing is recorded.
        """
        self._run, self._device, self._peak, self._shown = run, device, peak(model), shown
        self._seen, self._due = (time.perf_counter(), 0.0, 0.0), 0.0
        if not shown:
            return
        from ray.util.metrics import Counter, Gauge

        self._counters = {
            name: Counter(f"bertray_{name}", text, ("run", "split"))
            for name, text in (
                ("rows", "rows encoded"),
                ("tokens", "tokens encoded"),
                ("rejects", "rows set aside"),
            )
        }
        self._gauges = {
            name: Gauge(f"bertray_{name}", text, ("run", "device"))
            for name, text in (
                ("token_budget", "tokens of a pack that goes through the layers at once"),
                ("idle_share", "share of the time in which nothing was encoded"),
                *(
                    [("mfu", "operations of the layers, as a share of the device's dense 16-bit peak")]
                    * bool(self._peak)
                ),
            )
        }

    def count(self, split: str, counts: Mapping[str, int]) -> None:
        """Count rows, tokens and rejects of a unit that is done."""
        if self._shown:
            for name, count in counts.items():
                if count:  # Ray's counters refuse 0
                    self._counters[name].inc(count, {"run": self._run, "split": split})

    def look(self, encoding: float, operations: float, budget: int) -> None:
        """Show how busy the device was since the last look, unless that was a moment ago.

        Args:
            encoding: seconds in which the process has encoded so far.
            operations: of the layers so far.
            budget: tokens of a pack.
        """
        now, (then, encoded, done) = time.perf_counter(), self._seen
        if not self._shown or now < self._due:
            return
        if (encoding, operations) == (encoded, done) and now - then < _MOST_SECONDS:
            return
        self._seen, self._due = (now, encoding, operations), now + _LEAST_SECONDS
        busy = min(1.0, max(0.0, (encoding - encoded) / (now - then)))
        self._show("idle_share", 1.0 - busy)
        self._show("token_budget", budget)
        if self._peak:
            self._show("mfu", (operations - done) / (now - then) / self._peak)

    def _show(self, name: str, value: float) -> None:
        self._gauges[name].set(value, {"run": self._run, "device": self._device})
