"""Metrics in plain NumPy: of classes, of several labels a row, of numbers, of tagged entities, of answers in a text.

Counts are [labels, 3]: how many rows have the label and were given it (hits), have it (support), and were given it.
Those of parts of the rows add up to those of all.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]
Triple = tuple[int, int, int]
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def confusion(true: Counts, predicted: Counts, classes: int) -> Counts:
    """[classes, classes] how many rows of each true class (row) were given each class (column)."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy(matrix: Counts) -> float:
    """The share of rows that were given their own class."""
    return float(np.trace(matrix) / max(1, matrix.sum()))


def class_counts(matrix: Counts) -> Counts:
    """[classes, 3] hits, support and given of each class."""
    return np.stack([np.diag(matrix), matrix.sum(1), matrix.sum(0)], 1)


def per_class(matrix: Counts) -> dict[str, NDArray[np.float64]]:
    """precision, recall, f1 and support of each class, [classes] each; 0 where they are not defined."""
    return per_label(class_counts(matrix))


def macro_f1(matrix: Counts) -> float:
    """The mean F1 of the classes that occur, in the rows or in what they were given (as scikit-learn has it)."""
    return macro(class_counts(matrix))["f1"]


def micro_f1(matrix: Counts) -> float:
    """The F1 of the counts of all classes together; each row has one class, so it is the accuracy."""
    return micro(class_counts(matrix))["f1"]


def losses(probabilities: NDArray[np.floating], true: Counts) -> NDArray[np.float64]:
    """[n] minus the log of the probability of the true class, of probabilities [n, classes]."""
    chosen = probabilities[np.arange(len(true)), true].astype(np.float64)
    return -np.log(np.maximum(chosen, np.finfo(np.float32).tiny))


def auroc(scores: NDArray[np.floating], positive: Flags) -> float:
    """The probability that a positive row has a higher score than another row; equal scores count one half.

    From ranks (Mann and Whitney 1947): (sum of the positives' ranks - p (p + 1) / 2) / (p (n - p)), p positives of n.

    Args:
        scores: [n]. positive: [n].

    Returns:
        nan where all rows are positive or none is, and where a score is nan.
    """
    hits = int(np.count_nonzero(positive))
    if not 0 < hits < len(scores):
        return float("nan")
    above = _ranks(scores) @ positive - hits * (hits + 1) / 2
    return float(above / hits / (len(scores) - hits))


def macro_auroc(probabilities: NDArray[np.floating], true: Counts) -> float:
    """The mean of each class's auroc against the rest, over classes that some rows have and others have not.

    Equal to scikit-learn's roc_auc_score(..., multi_class="ovr", average="macro").

    Args:
        probabilities: [n, classes]. true: [n].

    Returns:
        nan where there is no such class.
    """
    classes = np.unique(true)
    if len(classes) < 2:
        return float("nan")
    return float(np.mean([auroc(probabilities[:, c], true == c) for c in classes]))


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """[n] rank of each value from 1, the mean of their ranks for equal ones; all nan if one is: it has no rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[which]
    return np.full_like(ranks, np.nan) if np.isnan(values).any() else ranks


def label_counts(true: Flags, given: Flags) -> Counts:
    """[labels, 3] hits, support and given of each label, of rows [n, labels] that have any number of them."""
    return np.stack([(true & given).sum(0), true.sum(0), given.sum(0)], 1)


def per_label(counts: Counts) -> dict[str, NDArray[np.float64]]:
    """precision, recall, f1 and support of each label, [labels] each; 0 where they are not defined."""
    hits, support, given = counts.T
    return {
        "precision": hits / np.maximum(given, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + given, 1),
        "support": support.astype(float),
    }


def micro(counts: Counts) -> dict[str, float]:
    """precision, recall and f1 of the counts [labels, 3] of all labels together."""
    return macro(counts.sum(0, keepdims=True))  # of one label the mean is its own


def macro(counts: Counts) -> dict[str, float]:
    """The means of precision, recall and f1 over the labels that occur: that rows have or were given."""
    occurring = per_label(counts[counts.any(1)])
    return {name: _mean(occurring[name]) for name in ("precision", "recall", "f1")}


def exact_share(true: Flags, given: Flags) -> float:
    """The share of rows [n, labels] that were given all their labels and no other (subset accuracy)."""
    return _mean((true == given).all(1))


def _mean(values: NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def regression(true: NDArray[np.floating], given: NDArray[np.floating]) -> dict[str, float]:
    """How near numbers [n] are to the true ones [n].

    Returns:
        pearson and spearman: the correlation of the numbers and of their ranks, 0 where either side is constant.
        rmse and mae: the root of the mean squared difference, and the mean absolute difference.
        r2: 1 - mean squared difference / variance of the true numbers, 0 where these are constant.
        All are 0 without rows, and nan where a number is.
    """
    a, b = true.astype(np.float64), given.astype(np.float64)
    squared, total = _mean((a - b) ** 2), _mean(_deviations(a) ** 2)
    return {
        "pearson": _correlation(a, b),
        "spearman": _correlation(_ranks(a), _ranks(b)),
        "rmse": squared**0.5,
        "mae": _mean(np.abs(a - b)),
        "r2": 1 - squared / total if total else 0.0,
    }


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = _deviations(a), _deviations(b)
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / scale, -1, 1)) if scale else 0.0


def _deviations(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] differences from the mean; from the first where all are equal, as their mean may be rounded to another."""
    equal = len(values) == 0 or (values == values[0]).all()
    return values - (values[:1] if equal else values.mean())


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities that the tags of a text's words tell: tags[start:end] are of a type, as (start, end, type).

    An entity begins at B- or S-, and at I- or E- after O, after an end or after another type, so that IOB1 is read
    too. It ends before O, B- or S-, before another type, and after E- or S-. These are the rules of conlleval (Tjong
    Kim Sang and Buchholz 2000) and of seqeval's default mode, whose end is the last word, not the one after it. A tag
    without a type is of type `_`.

    Raises:
        ValueError: a tag is neither O nor begins with one of B, I, E and S.
    """
    found, start, before, kind = set(), 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if mark not in ("O", "B", "I", "E", "S"):
            raise ValueError(f"{tag!r} is no tag: expected O, or B-, I-, E- or S- and a type")
        name = name or "_"
        breaks = mark in "OBS" or before in "OES" or name != kind
        if breaks and before != "O":
            found.add((start, place, kind))
        start = place if breaks else start
        before, kind = mark, name
    return found


def entity_counts(true: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> dict[str, Triple]:
    """type -> (hits, support, given): entities that were found, that there are, and that were given.

    An entity is found where the same words were given the same type.

    Args:
        true: tags of the words of each text. given: tags of the same words.
    """
    parts = (_counted(entities(a), entities(b)) for a, b in zip(true, given, strict=True))
    return sum_counts(parts)


def _counted(true: set[tuple[int, int, str]], given: set[tuple[int, int, str]]) -> dict[str, Triple]:
    hits, support, answers = (Counter(kind for _, _, kind in some) for some in (true & given, true, given))
    return {kind: (hits[kind], support[kind], answers[kind]) for kind in support | answers}


def sum_counts(parts: Iterable[Mapping[str, Triple]]) -> dict[str, Triple]:
    """The counts of each type of all parts together, types in order of name."""
    total: dict[str, Triple] = {}
    for part in parts:
        for kind, (hits, support, given) in part.items():
            before = total.get(kind, (0, 0, 0))
            total[kind] = (before[0] + hits, before[1] + support, before[2] + given)
    return dict(sorted(total.items()))


def entity_scores(counts: Mapping[str, Triple]) -> dict[str, Any]:
    """What entity_counts come to, as seqeval has it.

    Returns:
        micro, macro: precision, recall and f1. types: type -> precision, recall, f1 and support.
    """
    table = np.array(list(counts.values()), np.int64).reshape(-1, 3)
    each = per_label(table)
    types = {kind: {name: float(values[i]) for name, values in each.items()} for i, kind in enumerate(counts)}
    return {"micro": micro(table), "macro": macro(table), "types": types}


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, the words a, an and the, and needless whitespace (as SQuAD compares)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if an answer is a reference once both are normalized, else 0.

    As evaluate-v2.0 of SQuAD (Rajpurkar et al. 2018): references of which nothing is left do not count, and where no
    other is there the right answer is the empty one.
    """
    return float(normalize_answer(answer) in _references(references))


def span_f1(answer: str, references: Sequence[str]) -> float:
    """The highest F1 of an answer's words and a reference's, both normalized and counted (as evaluate-v2.0 of SQuAD).

    precision = common / words of the answer, recall = common / words of the reference. Without words on either side it
    is 1 if neither has any, else 0.
    """
    words = normalize_answer(answer).split()
    return max(_overlap(words, reference.split()) for reference in _references(references))


def _references(references: Sequence[str]) -> list[str]:
    return [text for text in map(normalize_answer, references) if text] or [""]


def _overlap(a: list[str], b: list[str]) -> float:
    """2 * common / (words of a + words of b): the harmonic mean of precision and recall."""
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b)) if a and b else float(a == b)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], Mapping[str, float]], rows: int, rounds: int = 200, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of figures (Efron and Tibshirani 1993, chapter 13): the 2.5th and 97.5th percentile of
    each over rounds in which as many rows are drawn, with repetition. The same seed gives the same.

    Args:
        statistic: the figures of some rows, given as indices [rows]; nan, or left out, where they are not defined.
        rows: how many there are.

    Returns:
        low and high of each figure over the rounds in which it is defined; nan where it never is.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, value in statistic(rng.integers(0, max(rows, 1), rows)).items():
            found.setdefault(name, []).append(value)
    return {name: _interval(np.array(values, np.float64)) for name, values in found.items()}


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
    return float(low), float(high)
