"""Doubts: rows whose label is probably wrong, and rows that contradict each other. In plain NumPy.

Two texts are the same here if they are equal in Unicode's normal form C, case folded, with whitespace squeezed.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-6  # by which a mean of equal probabilities may miss them
_BLOCK = 1_024  # rows on each side that are compared at once: 4 MB of cosines


def label_doubts(
    probabilities: NDArray[np.floating], true: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows whose label is probably wrong, by confident learning (Northcutt et al. 2021).

    A class is likely for a row if its probability is at least the mean that rows of that class have for it. A row is
    doubted if its likeliest such class is another than its own, and more probable than that.

    Args:
        probabilities: [n, classes] from heads that were not fitted on the row they judge. true: [n].

    Returns:
        rows [k], those with the highest p[suggested] - p[true] first, and the classes [k] suggested for them.
    """
    own = probabilities[np.arange(len(true)), true].astype(np.float64)
    classes = probabilities.shape[1]
    count = np.bincount(true, minlength=classes)
    usual = np.bincount(true, own, classes) / np.maximum(count, 1)
    usual[count == 0] = np.inf
    likely = np.where(probabilities >= usual - _ROUNDING, probabilities, -np.inf)
    suggested = likely.argmax(1)
    margin = likely.max(1) - own
    rows = np.flatnonzero((suggested != true) & (margin > 0))
    rows = rows[np.argsort(-margin[rows], kind="stable")]
    return rows, suggested[rows]


def conflicts(texts: Iterable[str], labels: Iterable[str]) -> list[dict[str, Any]]:
    """Texts that occur with several labels, those with most rows first.

    Returns:
        For each its text, as it is first written; labels, label -> how many rows, the most frequent first; and rows,
        their indices.
    """
    groups: dict[str, tuple[str, list[str], list[int]]] = {}
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        _, given, rows = groups.setdefault(_plain(text), (text, [], []))
        given.append(label)
        rows.append(row)
    found = [
        {"text": text, "labels": dict(Counter(given).most_common()), "rows": rows}
        for text, given, rows in groups.values()
        if len(set(given)) > 1
    ]
    return sorted(found, key=lambda each: -len(each["rows"]))


@dataclass(frozen=True)
class Overlap:
    """Test rows whose text is in the training rows too.

    rows: how many. differing: how many of them have another label than the first such training row; 0 without labels.
    examples: the first of them, each with text, row (in the test rows), train_row, and label and train_label if known.
    """

    rows: int
    differing: int
    examples: list[dict[str, Any]]


def overlap(
    train: Iterable[str],
    test: Iterable[str],
    train_labels: Sequence[str] | None = None,
    test_labels: Sequence[str] | None = None,
    examples: int = 20,
) -> Overlap:
    """Find test rows whose text is in the training rows. Texts are read once; 16 bytes of each training text are kept.

    Texts are compared by a hash of 64 bits: among a million training and as many test rows one is found by mistake with
    a probability of 5e-8.
    """
    hashes, first = np.unique(np.fromiter(map(_hash, train), np.uint64), return_index=True)
    rows, differing, shown = 0, 0, list[dict[str, Any]]()
    for row, text in enumerate(test):
        code = np.uint64(_hash(text))
        place = int(np.searchsorted(hashes, code))
        if place == len(hashes) or hashes[place] != code:
            continue
        found: dict[str, Any] = {"text": text, "row": row, "train_row": int(first[place])}
        if train_labels is not None and test_labels is not None:
            found |= {"label": test_labels[row], "train_label": train_labels[found["train_row"]]}
            differing += found["label"] != found["train_label"]
        rows += 1
        if len(shown) < examples:
            shown.append(found)
    return Overlap(rows, differing, shown)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _hash(text: str) -> int:
    code = blake2b(_plain(text).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(code.digest(), "little")


def near_duplicates(
    a: NDArray[np.floating], b: NDArray[np.floating], least: float = 0.98, most_pairs: int = 50
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The most similar pairs of a row of a [n, width] and a row of b [m, width].

    All n m cosines are computed, a block at a time: memory does not grow with n or m.

    Args:
        least: the cosine from which a pair counts; that of equal vectors may be rounded to 1 - 1e-6.
        most_pairs: how many are kept.

    Returns:
        Rows of a, rows of b and their cosines, [pairs] each, the most similar first. A vector of zeros is like none.
    """
    rows = np.zeros((0, 2), np.int64)
    cosines = np.zeros(0, np.float32)
    for i in range(0, len(a), _BLOCK):
        left = _unit(a[i : i + _BLOCK])
        for j in range(0, len(b), _BLOCK):
            block = np.minimum(left @ _unit(b[j : j + _BLOCK]).T, 1)
            full = len(cosines) == most_pairs > 0
            places = np.argwhere(block > cosines[-1] if full else block >= least)
            rows = np.concatenate([rows, places + np.array([i, j])])
            cosines = np.concatenate([cosines, block[tuple(places.T)]])
            best = np.lexsort((rows[:, 1], rows[:, 0], -cosines))[:most_pairs]
            rows, cosines = rows[best], cosines[best]
    return rows[:, 0], rows[:, 1], cosines


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """[n, width] vectors of length 1, zeros where they are zeros."""
    wide: NDArray[np.float32] = vectors.astype(np.float32)
    return wide / np.sqrt(np.maximum((wide * wide).sum(1, keepdims=True), np.finfo(np.float32).tiny))
