"""Labels: from what a data set writes (names or numbers) to class indices. Pure functions."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bertray.annotations import Ints, answers_of, names_in
from bertray.errors import SourceError


def find_names(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Label names taken from the labels themselves: in numeric order if all are numbers, else sorted."""
    numeric = all(_is_number(label) for label in counts)
    return tuple(sorted(counts, key=lambda label: (int(label), label) if numeric else (0, label)))


def counts(form: str, labels: pa.ChunkedArray) -> dict[str, int]:
    """How many rows, or words, have each label of kept labels (see `annotations`)."""
    found: Counter[str] = Counter()
    for label, times in Counter(labels.to_pylist()).items():
        for name in names_in(form, label):
            found[name] += times
    return dict(found)


def check(labels: Iterable[str], names: Sequence[str], place: str) -> None:
    """Check that every label is one of the names, or a number that counts them from 0.

    Raises:
        SourceError: naming the first that is neither.
    """
    known = {*names, *map(str, range(len(names)))}
    for label in labels:
        if label not in known:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise SourceError(
                f"{place}: label {label!r} is none of data.labels ({shown}) nor a number "
                f"from 0 to {len(names) - 1}. Correct the rows or the names."
            )


def index(distinct: Iterable[str], names: Sequence[str]) -> dict[str, int]:
    """What class each label stands for.

    Labels that are all names are taken as names, otherwise all as numbers that count the names from 0: names
    such as "1", "2", "3" work with labels 1, 2, 3 as well as with 0, 1, 2.

    Args:
        distinct: all labels of all splits.

    Raises:
        SourceError: they are neither all names nor all numbers of names.
    """
    labels = sorted(set(distinct))
    if all(label in names for label in labels):
        return {label: names.index(label) for label in labels}
    mixed = [label for label in labels if not (_is_number(label) and int(label) < len(names))]
    if mixed and len(mixed) < len(labels) and mixed[0] in names:
        number = next(label for label in labels if label not in mixed)
        raise SourceError(
            f"The labels mix names ({mixed[0]!r}) and numbers ({number!r}). Write all as names, or all as numbers."
        )
    if mixed:
        odd = next((label for label in mixed if label not in names), mixed[0])
        raise SourceError(
            f"Label {odd!r} is none of the label names ({', '.join(names[:10])}). "
            "Correct the rows, or give all names in data.labels."
        )
    return {label: int(label) for label in labels}


def to_classes(labels: Sequence[str], classes: Mapping[str, int]) -> NDArray[np.int64]:
    """[n] class index of each label."""
    return np.fromiter((classes[label] for label in labels), np.int64, len(labels))


def named(label: str, names: Sequence[str], classes: Mapping[str, int]) -> str:
    """A kept label of names or tags by their names, where they may be numbers."""
    return json.dumps([names[classes[part]] for part in json.loads(label)], ensure_ascii=False)


def check_tags(names: Iterable[str]) -> None:
    """Check that names are tags of words: O, or B-, I-, E- or S- and a type.

    Raises:
        SourceError: naming the first that is none.
    """
    for name in names:
        if name.partition("-")[0] not in ("O", "B", "I", "E", "S"):
            raise SourceError(
                f"Label {name!r} is no tag of a word: these are O, or B-, I-, E- or S- and a type. Where the rows have "
                "numbers, give the tags in the order of their numbers in data.labels."
            )


def targets(
    form: str, labels: Sequence[str], classes: Mapping[str, int], outputs: int, edges: Ints | None, spans: Ints | None
) -> NDArray[Any]:
    """What labels ask of a head.

    Args:
        labels: n, as they are kept (see `annotations`).
        classes: class index of each name.
        edges: [n + 1], spans: [words, 2] of words, where those have vectors.

    Returns:
        name: [n] classes. names: [n, outputs] of 0 and 1. number: [n, 1]. tokens: [words] classes. answers: [tokens, 2]
        how the start and the end of the answers of a question are spread over its tokens; 1 at [CLS], the first one, if
        there is no answer, or none that was encoded.
    """
    if form == "name":
        return to_classes(labels, classes)
    if form == "number":
        return np.array(labels, np.float64).astype(np.float32)[:, None]
    if form == "names":
        found = np.zeros((len(labels), outputs), np.float32)
        for row, label in enumerate(labels):
            found[row, [classes[name] for name in json.loads(label)]] = 1
        return found
    if form == "tokens":
        return to_classes([tag for label in labels for tag in json.loads(label)], classes)
    assert edges is not None and spans is not None
    rows = zip(labels, pairwise(edges.tolist()), strict=True)
    return np.concatenate([np.zeros((0, 2), np.float32), *(_spread(label, spans[i:j]) for label, (i, j) in rows)])


def _spread(label: str, spans: Ints) -> NDArray[np.float32]:
    """[tokens, 2] of one question."""
    found = np.zeros((len(spans), 2), np.float32)
    for start, text in answers_of(label):
        own = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < start + len(text)) & (spans[:, 0] < spans[:, 1]))
        if len(own):
            found[own[[0, -1]], [0, 1]] += 1
    if not found.any():
        found[0] = 1
    return found / found.sum(0)


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 19
