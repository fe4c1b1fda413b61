"""Calibration: how far probabilities can be trusted, and what is done about it. In plain NumPy.

Confidence is the probability [n] of what each row was given; correct [n] tells whether that is right.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Flags = NDArray[np.bool_]
COLDEST, HOTTEST = 0.05, 20.0  # temperatures; without a mistake among the rows the best would be 0
_POINTS = 100


@dataclass(frozen=True)
class Reliability:
    """Rows in bins of equal width by their confidence. Those of parts of the rows add up to that of all.

    count: [bins] rows. confidences: [bins] sum of their confidence. hits: [bins] how many of them are correct.
    """

    count: NDArray[np.int64]
    confidences: NDArray[np.float64]
    hits: NDArray[np.int64]

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(self.count + other.count, self.confidences + other.confidences, self.hits + other.hits)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """[bins] mean confidence, 0 in empty bins."""
        return self.confidences / np.maximum(self.count, 1)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """[bins] share of correct rows, 0 in empty bins."""
        return self.hits / np.maximum(self.count, 1)

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean over rows of |accuracy - confidence| of their bin."""
        return float(np.abs(self.hits - self.confidences).sum() / max(1, self.count.sum()))


def reliability(confidence: Floats, correct: Flags, bins: int = 15) -> Reliability:
    """How often rows are correct at each confidence (Guo et al. 2017): bin b of m holds those in (b/m, (b+1)/m]."""
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.searchsorted(inner, confidence)
    return Reliability(
        np.bincount(place, minlength=bins),
        np.bincount(place, confidence, bins).astype(np.float64),
        np.bincount(place, correct, bins).astype(np.int64),
    )


def temperature(logits: Floats, true: NDArray[np.int64]) -> float:
    """The T in [0.05, 20] with the least log loss of softmax(logits / T) (Guo et al. 2017).

    With b = 1/T and p = softmax(b z) the mean loss is convex in b: its slope is the mean of E_p[z] - z[true], and the
    slope's that of Var_p[z].

    Args:
        logits: [n, classes], finite. true: [n].

    Returns:
        1 where all T are as good, as with equal logits and without rows.
    """
    z = logits.astype(np.float64)
    z -= z.max(1, keepdims=True)
    chosen = z[np.arange(len(z)), true]

    def slopes(b: float) -> tuple[float, float]:
        p = np.exp(b * z)
        p /= p.sum(1, keepdims=True)
        mean = (p * z).sum(1)
        return float((mean - chosen).sum()), float((p * (z - mean[:, None]) ** 2).sum())

    return 1 / _flat_at(slopes)


def temperature_of_labels(logits: Floats, true: Flags) -> float:
    """The T in [0.05, 20] with the least log loss of sigmoid(logits / T), one T for all labels.

    With margins m = z where true, else -z, the mean loss log(1 + exp(-b m)) is convex in b = 1/T: with
    q = sigmoid(-b m) its slope is the mean of -m q, and the slope's that of m^2 q (1 - q).

    Args:
        logits: [n, labels], finite. true: [n, labels].

    Returns:
        1 where all T are as good, as with logits of 0 and without rows.
    """
    margins = np.where(true, logits, -logits).astype(np.float64)

    def slopes(b: float) -> tuple[float, float]:
        q = np.exp(-np.logaddexp(0, b * margins))
        return -float((margins * q).sum()), float((margins**2 * q * (1 - q)).sum())

    return 1 / _flat_at(slopes)


def _flat_at(slopes: Callable[[float], tuple[float, float]]) -> float:
    """The b in [1/HOTTEST, 1/COLDEST] at which a convex function is least; 1 where it is the same everywhere.

    Newton's steps from 1; where one would leave what is known to hold the least, that is halved on a log scale.

    Args:
        slopes: the function's first and second derivative at b.
    """
    low, high, b = 1 / HOTTEST, 1 / COLDEST, 1.0
    first = slopes(low)[0]
    if not first < 0:
        return low if first > 0 else b
    if slopes(high)[0] <= 0:
        return high
    for _ in range(100):
        slope, bend = slopes(b)
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / bend if bend > 0 else low
        step = step if low < step < high else (low * high) ** 0.5
        if slope == 0 or abs(step - b) < 1e-9 * b:
            break
        b = step
    return b


@dataclass(frozen=True)
class Abstention:
    """What comes of answering only rows whose confidence is at least a threshold, [points] each, thresholds rising.

    coverage: the share of rows that are answered. accuracy: the share of these that are correct.
    """

    threshold: NDArray[np.float64]
    coverage: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def abstention(confidence: Floats, correct: Flags) -> Abstention:
    """The risk-coverage curve (El-Yaniv and Wiener 2010) at up to 100 of the confidences: the lowest, the highest and,
    between each two, about as many distinct ones. A row whose confidence is nan is never answered."""
    threshold, answered, hits = _answered(confidence, correct)
    some = np.unique(np.linspace(0, len(threshold) - 1, _POINTS).round().astype(int)) if len(threshold) else slice(0)
    return Abstention(threshold[some], answered[some] / max(1, len(confidence)), hits[some] / answered[some])


def threshold_for(confidence: Floats, correct: Flags, accuracy: float) -> float:
    """The lowest threshold at which the answered rows have at least an accuracy.

    Returns:
        A confidence of one of the rows; 0 where all rows together are that accurate; inf where no threshold will do:
        no row is to be answered then.
    """
    threshold, answered, hits = _answered(confidence, correct)
    enough = np.flatnonzero(hits / answered >= accuracy)
    if not len(enough):
        return float("inf")
    return float(threshold[enough[0]]) if enough[0] else 0.0


def _answered(confidence: Floats, correct: Flags) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct confidences, rising; how many rows have at least that; how many of these are correct."""
    known = ~np.isnan(confidence)
    threshold, place = np.unique(confidence[known], return_inverse=True)
    rows = np.bincount(place, minlength=len(threshold))
    hits = np.bincount(place, correct[known], len(threshold)).astype(np.int64)
    return threshold.astype(np.float64), rows[::-1].cumsum()[::-1], hits[::-1].cumsum()[::-1]
