"""Metrics of classification, in plain NumPy, from a confusion matrix and probabilities."""

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def confusion(true: Counts, predicted: Counts, classes: int) -> Counts:
    """[classes, classes] how many rows of each true class (row) were given each class (column)."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy(matrix: Counts) -> float:
    """The share of rows that were given their own class."""
    return float(np.trace(matrix) / max(1, matrix.sum()))


def per_class(matrix: Counts) -> dict[str, NDArray[np.float64]]:
    """precision, recall, f1 and support of each class, [classes] each; 0 where they are not defined."""
    hits, support, given = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    return {
        "precision": hits / np.maximum(given, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + given, 1),
        "support": support.astype(float),
    }


def macro_f1(matrix: Counts) -> float:
    """The mean F1 of the classes that occur, in the rows or in what they were given (as scikit-learn has it)."""
    occurs = (matrix.sum(0) + matrix.sum(1)) > 0
    return float(per_class(matrix)["f1"][occurs].mean()) if occurs.any() else 0.0


def losses(probabilities: NDArray[np.floating], true: Counts) -> NDArray[np.float64]:
    """[n] minus the log of the probability of the true class, of probabilities [n, classes]."""
    chosen = probabilities[np.arange(len(true)), true].astype(np.float64)
    return -np.log(np.maximum(chosen, np.finfo(np.float32).tiny))
