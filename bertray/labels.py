"""Labels: from what a data set writes (names or numbers) to class indices. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bertray.errors import SourceError


def find_names(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Label names taken from the labels themselves: in numeric order if all are numbers, else sorted."""
    numeric = all(_is_number(label) for label in counts)
    return tuple(sorted(counts, key=lambda label: (int(label), label) if numeric else (0, label)))


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


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()
