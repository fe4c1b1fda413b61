"""What is unlike the training rows: how far a vector lies from the nearest class, and how far is too far. In plain
NumPy; knows nothing of heads, of files, or of Ray.

After Lee et al. 2018, "A simple unified framework for detecting out-of-distribution samples and adversarial attacks":
each class c has a mean m_c, all classes have one covariance S (of the rows around their class's mean), and a vector x
is as far away as its least Mahalanobis distance,

    d(x) = min_c sqrt((x - m_c)' A^-1 (x - m_c))        A = (1 - s) S + s u I

where u is the mean variance and s in [0, 1] what Ledoit and Wolf (2004) found to come nearest to the true covariance:
vectors are often as wide as there are rows, and S alone would then be near singular.

The rows that this is learned from lie nearer to it than others would, far nearer where they are few. So how far is too
far is taken from the distances of rows that were left out, one at a time: without a row, A changes by a matrix of rank
one, and the row's distance follows from what is known (Sherman and Morrison), without fitting again.

Vectors wider than 512 numbers are looked at from 512 random directions. Principal directions fit the rows that they
were found on, so that others lie nearer, which no row tells that is left out later; and they see less: what is unlike
the training rows differs from them where those hardly differ from each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
WIDEST = 512  # numbers of a vector that are looked at as they are; directions from which wider ones are
SHARE = 0.01  # of fresh rows like the training rows that are too far away
_MOST = 20_000  # rows
_NUMBERS = 1 << 25  # of all their vectors
_LEAST = 20  # rows that each class keeps, if it has so many
_BLOCK = 4_096  # rows at once,
_CELLS = 1 << 22  # and distances to classes
_SMALLEST = 1e-6  # of the mean variance: no direction has less


@dataclass(frozen=True)
class Familiar:
    """What the training rows look like.

    centre: [width] their mean. map: [width, k], from vectors around the centre to where the covariance is that of
    independent numbers, and distances are Euclidean; k is the width, at most 512. means: [classes, k] of the classes
    that have rows, mapped. Together 0.6 MB for vectors of 384 numbers, 5.5 MB for seven times as many.
    threshold: the distance that 1 % of fresh rows like the training rows exceed.
    rows: how many it was learned from.
    """

    centre: Floats
    map: Floats
    means: Floats
    threshold: float
    rows: int

    @cached_property
    def _half_squares(self) -> Floats:
        half: Floats = np.einsum("ck,ck->c", self.means, self.means) / 2
        return half

    def distance(self, vectors: NDArray[np.floating]) -> Floats:
        """[n] how far vectors [n, width] are from the nearest class."""
        found = np.empty(len(vectors), np.float32)
        for rows in _blocks(len(vectors), len(self.means)):
            x = (vectors[rows] - self.centre) @ self.map
            nearest = (x @ self.means.T - self._half_squares).max(1)
            found[rows] = np.sqrt(np.maximum(np.einsum("nk,nk->n", x, x) - 2 * nearest, 0))
        return found

    def outliers(self, vectors: NDArray[np.floating]) -> NDArray[np.bool_]:
        """[n] which of vectors [n, width] are too far away to be like the training rows."""
        return self.distance(vectors) > self.threshold


def sample(classes: Ints, width: int, seed: int = 0) -> Ints:
    """The numbers, rising, of the rows to learn from: at most 20,000, fewer of wide ones, drawn so that each class
    keeps its share, and at least 20 of its rows where there is room.

    Args:
        classes: [n] of all rows. width: of their vectors.
    """
    most = min(_MOST, _NUMBERS // width)
    if len(classes) <= most:
        return np.arange(len(classes))
    _, place, counts = np.unique(classes, return_inverse=True, return_counts=True)
    mixed = np.random.default_rng(seed).permutation(len(classes))
    mixed = mixed[np.argsort(place[mixed], kind="stable")]  # class by class
    rank = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    least = np.minimum(counts, min(_LEAST, most // len(counts)))
    room = (most - least.sum()) / max(1, (counts - least).sum())
    kept = least + ((counts - least) * room).astype(np.int64)
    return np.sort(mixed[rank < np.repeat(kept, counts)])


def fit(vectors: NDArray[np.floating], classes: Ints, seed: int = 0) -> Familiar | None:
    """Learn what rows look like; None where they are too few or all the same.

    Args:
        vectors: [n, width]; classes: [n], all the same number where rows have no classes.
        seed: of the directions from which wide vectors are looked at.
    """
    _, own, counts = np.unique(classes, return_inverse=True, return_counts=True)
    if len(vectors) < len(counts) + 2:
        return None
    x = vectors.astype(np.float32)
    centre = x.mean(0, dtype=np.float64).astype(np.float32)
    x -= centre
    directions = _directions(x.shape[1], seed) if x.shape[1] > WIDEST else None
    if directions is not None:
        x = x @ directions
    means = _means(x, own, counts)
    around = x - means[own]
    covariance: Floats = np.divide(around.T @ around, len(x), dtype=np.float32)
    scale = float(np.trace(covariance, dtype=np.float64)) / len(covariance)
    if scale <= 0:
        return None
    shrinkage = _shrinkage(around, covariance)
    variances, axes = np.linalg.eigh(covariance.astype(np.float64))
    variances = np.maximum((1 - shrinkage) * variances + shrinkage * scale, _SMALLEST * scale)
    white = (axes / np.sqrt(variances)).astype(np.float32)
    distances = _left_out(x @ white, means @ white, own, counts, (1 - shrinkage) / len(x))
    place = min(len(x), int(np.ceil((1 - SHARE) * (len(x) + 1)))) - 1  # of n + 1 rows, the last being a fresh one
    threshold = float(np.partition(distances, place)[place])
    whole = np.ascontiguousarray(white) if directions is None else directions @ white
    return Familiar(centre, whole, means @ white, threshold, len(x))


def _blocks(rows: int, classes: int) -> Iterator[slice]:
    """Slices of rows that together are all: few enough for their distances to all classes."""
    size = max(1, min(_BLOCK, _CELLS // classes))
    return (slice(start, start + size) for start in range(0, rows, size))


def _means(x: Floats, own: Ints, counts: Ints) -> Floats:
    """[classes, k] of rows [n, k]."""
    order = np.argsort(own, kind="stable")
    sums = np.add.reduceat(x[order], np.cumsum(counts) - counts, dtype=np.float64)
    means: Floats = (sums / counts[:, None]).astype(np.float32)
    return means


def _directions(width: int, seed: int) -> Floats:
    """[width, WIDEST] random directions, orthonormal."""
    mixed = np.random.default_rng(seed).standard_normal((width, WIDEST), np.float32)
    return np.linalg.qr(mixed)[0]


def _shrinkage(around: Floats, covariance: Floats) -> float:
    """How far to go from the covariance of rows [n, k] around 0 to the same variance everywhere, in [0, 1].

    With S = covariance and u = tr(S)/k it is min(1, b/d) with d = |S - u I|^2 and b = mean_i |x_i x_i' - S|^2 / n.
    """
    n, k = around.shape
    norm = float(np.square(covariance, dtype=np.float64).sum())
    spread = norm - float(np.trace(covariance, dtype=np.float64)) ** 2 / k
    squares = np.einsum("nk,nk->n", around, around).astype(np.float64)
    noise = (float(np.square(squares).mean()) - norm) / n
    return float(min(1.0, max(0.0, noise) / spread)) if spread > 0 else 1.0


def _left_out(x: Floats, means: Floats, own: Ints, counts: Ints, part: float) -> NDArray[np.float64]:
    """[n] the distance of each row to what is learned of all others.

    With e = x - m_y, all mapped, and r = n_y / (n_y - 1), leaving the row out takes part * r e e' from the matrix,
    which is I here, and moves m_y by e / (n_y - 1): then |v|^2 becomes |v|^2 + t (v'e)^2 with
    t = part * r / (1 - part * r |e|^2), and v is r e for its own class and x - m_c for any other. A class of one row is
    not known without it.

    Args:
        x: [n, k] and means: [classes, k], mapped. part: of each row in the matrix.
    """
    found = np.empty(len(x))
    for rows in _blocks(len(x), len(means)):
        some, y = x[rows].astype(np.float64), own[rows]
        e, n = some - means[y], counts[y]
        r = n / np.maximum(n - 1, 1)
        length = np.einsum("nk,nk->n", e, e)
        t = part * r / np.maximum(1 - part * r * length, _SMALLEST)
        squares = np.square(some).sum(1)[:, None] - 2 * some @ means.T + np.square(means).sum(1)
        along = np.einsum("nk,nk->n", some, e)[:, None] - e @ means.T
        squares += t[:, None] * along**2
        squares[np.arange(len(y)), y] = np.where(n > 1, r**2 * (length + t * length**2), np.inf)
        found[rows] = np.sqrt(np.maximum(squares.min(1), 0))
    return found
