"""Design: the matrix of one worker's rows that heads are fitted on, centred and scaled, in parts that cores share, and
its moments over all workers. Knows nothing of a head's parameters, of losses, or of files and Ray."""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bertray.heads import parts
from bertray.samples import Samples, Share

if TYPE_CHECKING:
    import torch

ROWS = 4_096  # that are gathered, or go through the objective, at once
_MANY = 1 << 26  # operations, from which on it pays to have threads take parts of the rows
Part = tuple[slice, "torch.Tensor | None"]  # of the rows, and the edges in it


@dataclass(frozen=True)
class Rows:
    """The rows of one worker, centred and scaled.

    centre, scale: [width] in float64; moved says whether they do anything.
    deviation: [width] of what comes out, about; 1 where it is not known or zero.
    cores: threads that may take a part of the rows each.
    held: all rows in parts, where there is room for them.
    """

    samples: Samples
    dtype: "torch.dtype"
    centre: "torch.Tensor"
    scale: "torch.Tensor"
    deviation: "torch.Tensor"
    moved: bool
    cores: int
    held: "dict[int, torch.Tensor]" = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Samples, share: Share, centred: bool, scaled: bool, dtype: "torch.dtype") -> "Rows":
        import torch

        centre = torch.zeros(samples.width, dtype=torch.float64, device=samples.device)
        scale = deviation = torch.ones_like(centre)
        cores = torch.get_num_threads() if samples.device.type == "cpu" else 1
        if centred:
            with threads(1):  # it is reading that takes the time
                centre, deviation = _moments(samples, share)
            deviation = torch.where(deviation > 0, deviation, 1.0)
        if scaled:
            scale, deviation = deviation, scale
        return cls(samples, dtype, centre, scale, deviation, centred, cores)

    def take(self, rows: "torch.Tensor | slice") -> "torch.Tensor":
        """[rows, width] of some of the vectors."""
        x = self.samples.take(rows, self.dtype)
        return x.sub(self.centre.to(x.dtype)).div_(self.scale.to(x.dtype)) if self.moved else x

    def parts(self) -> list[Part]:
        """All rows, some thousands at a time, and the edges in them."""
        samples = self.samples
        size = min(ROWS, math.ceil(len(samples.folds) / self.cores))
        return list(parts(len(samples.folds), size, samples.edges if samples.kind == "span" else None))

    def at(self, rows: slice) -> "torch.Tensor":
        """[rows, width] of one of the parts, which are kept where there is room for all."""
        if rows.start in self.held:
            return self.held[rows.start]
        x, samples = self.take(rows), self.samples
        if len(samples.folds) * samples.width * x.itemsize <= samples.spare:
            self.held[rows.start] = x
        return x

    def each(
        self, work: "Callable[[slice, torch.Tensor | None], tuple[torch.Tensor, ...]]", cost: int
    ) -> "Iterator[tuple[torch.Tensor, ...]]":
        """What work gives for each part, in order, where all together takes about `cost` operations.

        On a CPU each core takes parts of its own. Cores then wait for each other once an evaluation and not at every
        operation, which costs many times what it gains where other processes run as well.
        """
        import torch

        found = self.parts()
        cores = min(self.cores, len(found)) if cost > _MANY else 1
        if cores < 2:
            yield from itertools.starmap(work, found)
            return
        with threads(1), ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, *zip(*found, strict=True))


def _moments(samples: Samples, share: Share) -> "tuple[torch.Tensor, torch.Tensor]":
    """Mean and standard deviation [width] of the rows of all workers that count; 0 where all are the same."""
    import torch

    sums = torch.zeros(3, samples.width, dtype=torch.float64, device=samples.device)
    for rows, _ in parts(len(samples.folds), ROWS):
        x, counts = samples.take(rows, torch.float64), (samples.weights[rows] > 0).double()
        sums[0] += counts.sum()
        sums[1] += counts @ x
        sums[2] += counts @ x.square()
    share.sum(sums)
    mean, square = sums[1:] / sums[0].clamp_min(1)
    variance = square - mean.square()
    # What is left of a column of equal numbers is rounding.
    return mean, torch.where(variance > 1e-13 * square, variance, 0.0).sqrt()


def second_moments(rows: Rows, blocks: int, share: Share, crossed: bool = False) -> "torch.Tensor":
    """The mean of x x' over the rows of all workers [inner, inner], or its diagonal [inner]; of blocks that are mixed
    (inner is the width of one), with the equal shares that fits begin with. Columns are divided by their deviations
    meanwhile, so that in float32 those of small numbers are not lost beside the others."""
    import torch

    inner = rows.samples.width // blocks
    scale = rows.deviation.view(blocks, inner).mean(0)
    shape = (inner, inner) if crossed else (inner,)
    total = torch.zeros(*shape, dtype=torch.float64, device=rows.samples.device)
    counted = rows.samples.weights.double().sum()

    def work(part: slice, _: "torch.Tensor | None") -> "tuple[torch.Tensor]":
        x = rows.at(part)
        x = (x.view(len(x), blocks, inner).mean(1) if blocks > 1 else x) / scale.to(x.dtype)
        weighted = rows.samples.weights[part].to(x.dtype)
        return ((x * weighted[:, None]).T @ x if crossed else weighted @ x.square(),)

    for (found,) in rows.each(work, 2 * len(rows.samples.folds) * total.numel()):
        total += found
    share.sum(total, counted)
    return total / counted.clamp_min(1e-30) * (torch.outer(scale, scale) if crossed else scale.square())


def decomposed(gram: "torch.Tensor", share: Share) -> "tuple[torch.Tensor, torch.Tensor]":
    """Eigenvalues [n] and eigenvectors [n, n], those of the first worker for all: others may round differently."""
    import torch

    small = len(gram) ** 3 < 4 * _MANY
    with threads(1 if small else torch.get_num_threads()):
        values, basis = torch.linalg.eigh(gram)
    if share.rank:
        values.zero_()
        basis.zero_()
    share.sum(values, basis)
    return values, basis


def worker_mean(number: int, rows: Rows, share: Share) -> int:
    """The mean over workers, for what all have to do alike."""
    import torch

    total = torch.tensor(float(number), dtype=torch.float64, device=rows.samples.device)
    share.sum(total)
    return int(total) // share.world


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with that many threads meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
