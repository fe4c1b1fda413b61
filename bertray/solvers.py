"""Solvers: samples to the weights of linear heads, many at once. Adam and SGD run in batches, L-BFGS over all rows.
Knows nothing of files or of Ray; what several workers compute is summed by their Share.

A trial is one head to fit: its penalty, the fold it leaves out, its seed. All trials see the same vectors, so every
evaluation is one matrix product forward and one back for all of them.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bertray.heads import LinearHead, objective, parts
from bertray.samples import Samples, Share
from bertray.spec import Head

if TYPE_CHECKING:
    import torch

_EVALUATIONS = 1_000  # of L-BFGS at most
_HISTORY = 10  # steps that L-BFGS remembers
_IDLE = 20  # evaluations without progress, after which rounding is what keeps a trial from its tolerance
_ROWS = 4_096  # that are gathered, or go through the objective, at once
_FEW = 1 << 23  # operations of a step, below which handing a part to another thread takes longer than doing it
_MANY = 1 << 26  # operations, from which on it pays to have threads take parts of the rows
_WIDE = 4_096  # numbers a vector, above which a matrix that wide takes too long to decompose
_ROOM = 1 << 28  # bytes that what L-BFGS remembers may always take
Part = tuple[slice, "torch.Tensor | None"]  # of the rows, and the edges in it
State = dict[str, "torch.Tensor"]
Record = Callable[[float], None]
Save = Callable[[State], None]


@dataclass(frozen=True)
class Trial:
    """l2: the penalty; fold: rows of this fold are left out (-1: none); seed: of the first weights of adam and sgd."""

    l2: float
    fold: int = -1
    seed: int = 0


def solve(
    samples: Samples,
    trials: Sequence[Trial],
    spec: Head,
    share: Share,
    record: Record,
    dtype: "torch.dtype | None" = None,
    start: Mapping[str, "torch.Tensor"] | None = None,
    save: Save | None = None,
) -> list[LinearHead]:
    """Fit a linear head for each trial.

    Args:
        record: is told the mean objective of the trials after each epoch (adam, sgd) or evaluation (lbfgs).
        dtype: what to compute in. Left out: float64 for lbfgs, float32 for adam and sgd.
        start: a state that `save` was given: adam and sgd take the very steps that were left, lbfgs starts from there.
        save: is given the state once an epoch, or every 20 evaluations. Its tensors change afterwards.

    Returns:
        Heads for the vectors as they are: centring, standardizing and mixing are folded into them.
    """
    import torch

    exact = spec.optimizer == "lbfgs"
    dtype = dtype or (torch.float64 if exact else torch.float32)
    rows = _Rows.of(samples, share, exact or spec.standardize, spec.standardize, dtype)
    form = _Form(samples.outputs, samples.width, samples.blocks if spec.combine == "mix" else 1)
    flat = (_to_optimum if exact else _in_batches)(rows, form, trials, spec, share, record, start or {}, save)
    weight, bias = form.spread(flat.double())
    weight = weight / rows.scale
    bias = bias - weight @ rows.centre
    if samples.kind == "span":  # the same for all rows of a group: it changes nothing
        bias = torch.zeros_like(bias)
    arrays = zip(weight.float().cpu().numpy(), bias.float().cpu().numpy(), strict=True)
    return [LinearHead(weight, bias) for weight, bias in arrays]


def held_out(samples: Samples, heads: Sequence[LinearHead], trials: Sequence[Trial]) -> NDArray[np.float32]:
    """[settings, mine rows, outputs] logits of every row by the heads that were fitted without its fold.

    Args:
        heads: as they come from `solve`.
        trials: for every setting one after another its folds, in the same order. Rows of no such fold get NaN.
    """
    import torch

    folds = list(dict.fromkeys(trial.fold for trial in trials))
    settings = len(trials) // len(folds)
    found = np.full((settings, len(samples.folds), samples.outputs), np.nan, np.float32)
    for number, fold in enumerate(folds):
        assert all(trial.fold == fold for trial in trials[number :: len(folds)]), "folds of settings must be in order"
        weight, bias = (
            torch.from_numpy(np.stack([getattr(head, name) for head in heads[number :: len(folds)]])).to(samples.device)
            for name in ("weight", "bias")
        )
        for rows in torch.nonzero(samples.folds == fold).flatten().split(_ROWS):
            x = samples.take(rows, torch.float32)
            logits = torch.addmm(bias.view(-1), x, weight.view(-1, samples.width).T)
            each = logits.view(len(rows), settings, samples.outputs).transpose(0, 1)
            found[:, rows.cpu().numpy()] = each.cpu().numpy()
    return found


@dataclass(frozen=True)
class _Form:
    """How the numbers of a head lie in one flat tensor: weight [outputs, width], bias [outputs] and, where vectors
    consist of several blocks that are mixed, what their shares come from [blocks].

    The mix is that of Peters et al. 2018 (Deep contextualized word representations, equation 1): all blocks have one
    weight W, and that of block l of the whole vector is softmax(a)_l W. Only W is penalized.
    """

    outputs: int
    width: int
    blocks: int = 1

    @property
    def inner(self) -> int:
        """The width of W."""
        return self.width // self.blocks

    @property
    def penalized(self) -> int:
        return self.outputs * self.inner

    @property
    def size(self) -> int:
        return self.penalized + self.outputs + (self.blocks if self.blocks > 1 else 0)

    def weight(self, flat: "torch.Tensor") -> "torch.Tensor":
        """[M, outputs, inner] of flat [M, size], or of a gradient."""
        return flat[:, : self.penalized].view(-1, self.outputs, self.inner)

    def bias(self, flat: "torch.Tensor") -> "torch.Tensor":
        """[M, outputs] of flat [M, size]."""
        return flat[:, self.penalized : self.penalized + self.outputs]

    def shares(self, flat: "torch.Tensor") -> "torch.Tensor":
        """[M, blocks] of flat [M, size]."""
        return flat[:, self.penalized + self.outputs :].softmax(1)

    def spread(self, flat: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Weight [M, outputs, width] and bias [M, outputs] on the whole vectors."""
        weight, bias = self.weight(flat), self.bias(flat)
        if self.blocks == 1:
            return weight, bias
        mixed = self.shares(flat)[:, None, :, None] * weight[:, :, None]
        return mixed.reshape(-1, self.outputs, self.width), bias

    def gather(self, flat: "torch.Tensor", by_weight: "torch.Tensor", by_bias: "torch.Tensor") -> "torch.Tensor":
        """[M, size] from the derivatives by what `spread` gave: the chain rule.

        With s = softmax(a) and G_l the derivative by block l: sum_l s_l G_l for W, s_l (d_l - sum_k s_k d_k) for a,
        where d_l = <G_l, W>.
        """
        import torch

        if self.blocks == 1:
            return torch.cat([by_weight.reshape(len(flat), -1), by_bias], 1)
        blocks, shares = by_weight.view(-1, self.outputs, self.blocks, self.inner), self.shares(flat)
        inner = torch.einsum("mobi,mb->moi", blocks, shares)
        by_shares = torch.einsum("mobi,moi->mb", blocks, self.weight(flat))
        by_shares = shares * (by_shares - (shares * by_shares).sum(1, keepdim=True))
        return torch.cat([inner.reshape(len(flat), -1), by_bias, by_shares], 1)


@dataclass(frozen=True)
class _Rows:
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
    def of(cls, samples: Samples, share: Share, centred: bool, scaled: bool, dtype: "torch.dtype") -> "_Rows":
        import torch

        centre = torch.zeros(samples.width, dtype=torch.float64, device=samples.device)
        scale = deviation = torch.ones_like(centre)
        cores = torch.get_num_threads() if samples.device.type == "cpu" else 1
        if centred:
            with _threads(1):  # it is reading that takes the time
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
        size = min(_ROWS, math.ceil(len(samples.folds) / self.cores))
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
        with _threads(1), ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, *zip(*found, strict=True))


def _moments(samples: Samples, share: Share) -> "tuple[torch.Tensor, torch.Tensor]":
    """Mean and standard deviation [width] of the rows of all workers that count; 0 where all are the same."""
    import torch

    sums = torch.zeros(3, samples.width, dtype=torch.float64, device=samples.device)
    for rows, _ in parts(len(samples.folds), _ROWS):
        x, counts = samples.take(rows, torch.float64), (samples.weights[rows] > 0).double()
        sums[0] += counts.sum()
        sums[1] += counts @ x
        sums[2] += counts @ x.square()
    share.sum(sums)
    mean, square = sums[1:] / sums[0].clamp_min(1)
    variance = square - mean.square()
    # What is left of a column of equal numbers is rounding.
    return mean, torch.where(variance > 1e-13 * square, variance, 0.0).sqrt()


class _Counting:
    """How much each row counts for each trial. Trials that leave out the same fold have the same weights: these are
    kept once a fold, and copied for some rows at a time."""

    def __init__(self, samples: Samples, folds: Sequence[int], dtype: "torch.dtype", left_out: bool = False) -> None:
        import torch

        distinct = sorted(set(folds))
        place, weights = samples.device, samples.weights.to(dtype)
        theirs = samples.folds == torch.tensor([fold if fold >= 0 else -2 for fold in distinct], device=place)[:, None]
        # Rows to choose by weigh nothing in a fit; where they are judged, each counts.
        self.weights = torch.where(theirs == left_out, torch.ones_like(weights) if left_out else weights, 0)
        self.which = torch.tensor([distinct.index(fold) for fold in folds], device=place)

    def of(self, rows: "torch.Tensor | slice", which: "torch.Tensor | None" = None) -> "torch.Tensor":
        """[trials, rows] for some of the rows, and of the trials."""
        return self.weights[:, rows].index_select(0, self.which if which is None else which)

    def in_batches(self, rows: "torch.Tensor", counts: Sequence[int], samples: Samples, share: Share) -> "torch.Tensor":
        """[trials, rows] for rows that are so many batches: sums over a batch of all workers are means."""
        import torch

        weights = self.weights[:, rows]
        batch = torch.repeat_interleave(torch.tensor(counts)).to(rows.device)
        totals = weights.new_zeros(len(weights), len(counts))
        totals.index_add_(1, batch, weights * _truth(samples, rows))
        share.sum(totals)
        return (weights / totals.clamp_min(1e-30)[:, batch]).index_select(0, self.which)

    def normalize(self, samples: Samples, share: Share) -> None:
        """Make sums over all rows of all workers means."""
        totals = (self.weights.double() * _truth(samples, slice(None))).sum(1)
        share.sum(totals)
        self.weights /= totals.clamp_min(1e-30).to(self.weights.dtype)[:, None]


def _truth(samples: Samples, rows: "torch.Tensor | slice") -> "torch.Tensor | float":
    """How much a row counts in a mean: in a span it is groups that count, and each row by its share of the truth."""
    return samples.targets[rows].mean(1) if samples.kind == "span" else 1.0


class _Mean:
    """The data term over all rows of all workers, for some of the trials."""

    def __init__(
        self, rows: _Rows, form: _Form, folds: Sequence[int], spec: Head, share: Share, left_out: bool = False
    ):
        self._rows, self._form, self._share, self._smoothing = rows, form, share, spec.label_smoothing
        self._counting = _Counting(rows.samples, folds, rows.dtype, left_out)
        self._counting.normalize(rows.samples, share)

    def __call__(self, flat: "torch.Tensor", active: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Losses [A] and gradient [A, size] at flat [A, size], the parameters of the trials `active` [A]."""
        import torch

        samples, which = self._rows.samples, self._counting.which[active]
        weight, bias = self._form.spread(flat)
        sums = [torch.zeros(len(flat), dtype=torch.float64, device=flat.device), *map(torch.zeros_like, (weight, bias))]

        def work(rows: slice, edges: "torch.Tensor | None") -> "tuple[torch.Tensor, ...]":
            weights, targets = self._counting.of(rows, which).T, samples.targets[rows]
            return objective(samples.kind, weight, bias, self._rows.at(rows), targets, weights, edges, self._smoothing)

        for found in self._rows.each(work, 4 * len(samples.folds) * weight.numel()):
            for total, part in zip(sums, found, strict=True):
                total += part
        loss, gradient = sums[0], self._form.gather(flat, *sums[1:])
        self._share.sum(loss, gradient)
        return loss, gradient


def _to_optimum(
    rows: _Rows,
    form: _Form,
    trials: Sequence[Trial],
    spec: Head,
    share: Share,
    record: Record,
    start: Mapping[str, "torch.Tensor"],
    save: Save | None,
) -> "torch.Tensor":
    """[M, size] at the optimum of each trial, as many trials at a time as there is room for."""
    import torch

    place = rows.samples.device
    flat = torch.zeros(len(trials), form.size, dtype=rows.dtype, device=place)
    if "flat" in start:
        flat.copy_(start["flat"])
    precondition = _Curvature(rows, form, share)
    evaluated = 0

    def tell(loss: float) -> None:
        nonlocal evaluated
        evaluated += 1
        record(loss)
        if save and evaluated % 20 == 0:
            save({"flat": flat})

    each = 2 * (_HISTORY + 4) * form.size * rows.dtype.itemsize
    together = max(1, max(_ROOM, _mean_of(rows.samples.spare, rows, share) // 2) // each)
    for first in range(0, len(trials), together):
        some = trials[first : first + together]
        mean = _Mean(rows, form, [trial.fold for trial in some], spec, share)
        l2 = torch.tensor([trial.l2 for trial in some], dtype=torch.float64, device=place)
        with _threads(1 if rows.cores > 1 else torch.get_num_threads()):
            _Descent(flat[first : first + together], l2, mean, precondition, form).run(tell)
    return flat


def _mean_of(number: int, rows: _Rows, share: Share) -> int:
    """The mean over workers, for what all have to do alike."""
    import torch

    total = torch.tensor(float(number), dtype=torch.float64, device=rows.samples.device)
    share.sum(total)
    return int(total) // share.world


class _Descent:
    """L-BFGS for many trials at once, each with its own direction and step (Nocedal and Wright, Numerical Optimization,
    algorithm 7.4), by the line search of Lewis and Overton 2013 (Nonsmooth optimization via quasi-Newton methods,
    algorithm 2.6): an interval that is doubled or halved until the step is long enough and falls enough.

    No trial waits for another: at every evaluation each is at a point of its own line search, or starts the next one.
    A trial that has arrived drops out. `flat` holds the best points.

    A: the trials that are still under way. point, gradient, direction: [A, size]; all others: [A].
    """

    def __init__(
        self, flat: "torch.Tensor", l2: "torch.Tensor", mean: _Mean, precondition: "_Curvature", form: _Form
    ) -> None:
        import torch

        self._flat, self._mean, self._precondition, self._form, self._l2 = flat, mean, precondition, form, l2
        self._coarse = torch.finfo(flat.dtype).eps
        self._tolerance = 1e-7 if flat.dtype == torch.float64 else 1e-5
        self.active = torch.arange(len(flat), device=flat.device)
        self.history: deque[tuple[torch.Tensor, ...]] = deque(maxlen=_HISTORY)  # steps, changes of gradient, 1 / s'y

    def run(self, tell: Record) -> None:
        """Until all trials have arrived, or no longer get on."""
        import torch

        self._begin()
        losses = self.value.clone()
        tell(float(losses.mean()))
        for _ in range(_EVALUATIONS - 1):
            self._drop((self.steepest <= self._tolerance) | (self.idle >= _IDLE))
            if not len(self.active):
                return
            self._step(*self._evaluate(torch.addcmul(self.point, self.direction, self.length[:, None])))
            self._flat[self.active], losses[self.active] = self.point, self.value
            tell(float(losses.mean()))

    def _begin(self) -> None:
        import torch

        self.point = self._flat.clone()
        _, self.value, self.gradient = self._evaluate(self.point)
        self.steepest = self.gradient.abs().amax(1)
        self.idle = torch.zeros_like(self.active)
        self.factor = torch.ones_like(self.steepest)
        self.direction, self.slope = self._downhill()
        self.length, self.low = torch.ones_like(self.steepest), torch.zeros_like(self.steepest)
        self.high = torch.full_like(self.steepest, torch.inf)

    def _evaluate(self, point: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """The point, and objective [A] and gradient [A, size] there."""
        loss, gradient = self._mean(point, self.active)
        weight, l2 = point[:, : self._form.penalized], self._l2[self.active]
        gradient[:, : self._form.penalized] += l2.to(weight.dtype)[:, None] * weight
        return point, loss + l2 / 2 * weight.double().square().sum(1), gradient

    def _step(self, point: "torch.Tensor", value: "torch.Tensor", gradient: "torch.Tensor") -> None:
        """Take what was evaluated as the next point, or as an end of the interval of lengths."""
        import torch

        rounding = self._coarse * value.abs()
        falls = value <= self.value + 1e-4 * self.length * self.slope + rounding
        taken = falls & ((gradient * self.direction).sum(1) >= 0.9 * self.slope)
        self.high = torch.where(falls, self.high, self.length)
        self.low = torch.where(falls, self.length, self.low)
        steepest = gradient.abs().amax(1)
        better = taken & ((value < self.value - rounding) | (steepest < self.steepest))
        self.idle = torch.where(better, 0, self.idle + 1)
        self.steepest = torch.where(taken, torch.minimum(steepest, self.steepest), self.steepest)
        self._remember(taken, point - self.point, gradient - self.gradient)
        self.point = torch.where(taken[:, None], point, self.point)
        self.gradient = torch.where(taken[:, None], gradient, self.gradient)
        self.value = torch.where(taken, value, self.value)
        self._aim(taken)

    def _aim(self, taken: "torch.Tensor") -> None:
        """The next length; for trials that have taken a point, in a new direction."""
        import torch

        direction, slope = self._downhill()
        self.direction = torch.where(taken[:, None], direction, self.direction)
        self.slope = torch.where(taken, slope, self.slope)
        self.high = self.high.masked_fill(taken, torch.inf)
        self.low = self.low.masked_fill(taken, 0)
        between = torch.where(self.high.isinf(), 2 * self.low, (self.low + self.high) / 2)
        self.length = torch.where(taken, 1, between)

    def _remember(self, taken: "torch.Tensor", step: "torch.Tensor", change: "torch.Tensor") -> None:
        """A pair of step and change of gradient; one of zeros for trials that have not taken a step."""
        import torch

        curved = (step * change).sum(1)
        taken = taken & (curved > self._coarse * (change * change).sum(1) ** 0.5 * (step * step).sum(1) ** 0.5)
        step, change = (torch.where(taken[:, None], values, 0) for values in (step, change))
        shaped = (change * self._precondition(change, self._l2[self.active])).sum(1)
        self.factor = torch.where(taken, curved / shaped, self.factor)
        self.history.append((step, change, torch.where(taken, 1 / curved, 0)))

    def _downhill(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """The direction [A, size] by the two-loop recursion, and the slope [A] along it."""
        found, parts = self.gradient.clone(), []
        for step, change, inverse in reversed(self.history):
            parts.append(inverse * (step * found).sum(1))
            found -= parts[-1][:, None] * change
        found = self._precondition(found, self._l2[self.active]).mul_(self.factor[:, None])
        for (step, change, inverse), part in zip(self.history, reversed(parts), strict=True):
            found += (part - inverse * (change * found).sum(1))[:, None] * step
        slope = -(self.gradient * found).sum(1)
        return found.neg_(), slope

    def _drop(self, arrived: "torch.Tensor") -> None:
        if not arrived.any():
            return
        left = ~arrived
        for name in ("active", "point", "value", "gradient", "steepest", "idle", "factor", "direction", "slope"):
            setattr(self, name, getattr(self, name)[left])
        self.length, self.low, self.high = self.length[left], self.low[left], self.high[left]
        self.history = deque((tuple(part[left] for part in pair) for pair in self.history), _HISTORY)


class _Curvature:
    """A rough inverse of the curvature, for all trials: with the mean of x x' = V diag(v) V' that of a trial's
    objective in the weight of each output is about V diag(c v + l2) V', where c is that of the loss in a logit.

    Boehning 1992 (Multinomial logistic regression algorithm) has c = 1/2 as a bound for softmax; at weights of zero,
    where fits begin, it is 1/outputs. Squared losses have c = 1 everywhere, so that ridge regression ends in a step.
    """

    def __init__(self, rows: _Rows, form: _Form, share: Share) -> None:
        import torch

        self._form, kind = form, rows.samples.kind
        self._curved = {"softmax": 1 / max(2, form.outputs), "sigmoid": 1 / 4, "squared": 1.0, "span": 1 / 2}[kind]
        self._basis: torch.Tensor | None = None
        if form.inner > _WIDE:
            values = _moments_of(rows, form, share)
        else:
            values, basis = _decomposed(_moments_of(rows, form, share, crossed=True), share)
            self._basis = basis.to(rows.dtype)
        least = 10 * torch.finfo(rows.dtype).eps * values.max().clamp_min(1e-30)
        self._values = self._curved * values.clamp_min(float(least))

    def __call__(self, gradient: "torch.Tensor", l2: "torch.Tensor") -> "torch.Tensor":
        """[A, size] of a gradient [A, size] and penalties [A]."""
        found = gradient / self._curved
        weight = self._form.weight(gradient)
        scales = (1 / (self._values + l2[:, None])).to(gradient.dtype)[:, None]
        turned = weight * scales if self._basis is None else ((weight @ self._basis) * scales) @ self._basis.T
        found[:, : self._form.penalized] = turned.reshape(len(gradient), -1)
        return found


def _moments_of(rows: _Rows, form: _Form, share: Share, crossed: bool = False) -> "torch.Tensor":
    """The mean of x x' over the rows of all workers [inner, inner], or its diagonal [inner]; of blocks that are mixed,
    with the equal shares that fits begin with. Columns are divided by their deviations meanwhile, so that in float32
    those of small numbers are not lost beside the others."""
    import torch

    scale = rows.deviation.view(form.blocks, form.inner).mean(0)
    shape = (form.inner, form.inner) if crossed else (form.inner,)
    total = torch.zeros(*shape, dtype=torch.float64, device=rows.samples.device)
    counted = rows.samples.weights.double().sum()

    def work(part: slice, _: "torch.Tensor | None") -> "tuple[torch.Tensor]":
        x = rows.at(part)
        x = (x.view(len(x), form.blocks, form.inner).mean(1) if form.blocks > 1 else x) / scale.to(x.dtype)
        weighted = rows.samples.weights[part].to(x.dtype)
        return ((x * weighted[:, None]).T @ x if crossed else weighted @ x.square(),)

    for (found,) in rows.each(work, 2 * len(rows.samples.folds) * total.numel()):
        total += found
    share.sum(total, counted)
    return total / counted.clamp_min(1e-30) * (torch.outer(scale, scale) if crossed else scale.square())


def _decomposed(gram: "torch.Tensor", share: Share) -> "tuple[torch.Tensor, torch.Tensor]":
    """Eigenvalues and eigenvectors, those of the first worker for all: others may round differently."""
    import torch

    small = len(gram) ** 3 < 4 * _MANY
    with _threads(1 if small else torch.get_num_threads()):
        values, basis = torch.linalg.eigh(gram)
    if share.rank:
        values.zero_()
        basis.zero_()
    share.sum(values, basis)
    return values, basis


def _in_batches(
    rows: _Rows,
    form: _Form,
    trials: Sequence[Trial],
    spec: Head,
    share: Share,
    record: Record,
    start: Mapping[str, "torch.Tensor"],
    save: Save | None,
) -> "torch.Tensor":
    """[M, size] by Adam or SGD. The recorded loss is the mean over the epoch's batches, as they were met.

    At a constant learning rate the last weights are those of a walk around the optimum; the mean over the last
    tenth of the steps is nearer to it (Polyak and Juditsky 1992) and depends less on the seed.
    """
    import torch

    place = rows.samples.device
    walk = _Walk(rows, form, trials, spec, share)
    state = walk.begin() | {name: tensor.to(place, copy=True) for name, tensor in start.items()}
    folds = [trial.fold for trial in trials]
    judge = _Mean(rows, form, folds, spec, share, left_out=True) if spec.early_stopping and max(folds) >= 0 else None
    small = 4 * spec.batch_size * state["flat"].numel() < _FEW
    with _threads(1 if small else torch.get_num_threads()):
        while int(state["epoch"]) < spec.epochs and not _in_vain(state, folds, spec):
            record(walk.epoch(state))
            if judge:
                _keep_best(state, judge(state["flat"], torch.arange(len(trials), device=place))[0])
            if save:
                save(state)
    left_out = torch.tensor(folds, device=place)[:, None] >= 0
    return torch.where(left_out, state["best"], state["mean"]) if judge else state["mean"]


def _keep_best(state: State, losses: "torch.Tensor") -> None:
    """The weights of the epoch with the least loss on rows left out; `idle`: how many epochs ago that was."""
    import torch

    better = losses < state["least"]
    state["least"] = torch.where(better, losses, state["least"])
    state["best"] = torch.where(better[:, None], state["flat"], state["best"])
    state["idle"] = torch.where(better, 0, state["idle"] + 1)


def _in_vain(state: State, folds: Sequence[int], spec: Head) -> bool:
    """Whether no trial has become better for long enough."""
    return 0 < spec.early_stopping <= int(state["idle"].min()) and min(folds) >= 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch with that many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Walk:
    """Epochs of Adam or SGD over all trials. All that changes is in a state, so that another process can go on from it:
    the weights `flat`, their `mean` over the last steps, Adam's moments, the `epoch`, the `generator` of the order."""

    def __init__(self, rows: _Rows, form: _Form, trials: Sequence[Trial], spec: Head, share: Share) -> None:
        import torch

        self._rows, self._form, self._trials, self._spec, self._share = rows, form, trials, spec, share
        self._counting = _Counting(rows.samples, [trial.fold for trial in trials], rows.dtype)
        l2 = torch.tensor([trial.l2 for trial in trials], dtype=rows.dtype, device=rows.samples.device)
        self._l2 = l2[:, None] if l2.any() else None
        self._steps = math.ceil(rows.samples.count / spec.batch_size)
        self._averaged = max(1, self._steps * spec.epochs // 10)
        usual = _mean_of(len(rows.samples.folds), rows, share) * share.world // rows.samples.count  # rows of a group
        self._batches = max(1, _ROWS // (spec.batch_size * max(1, usual)))  # that are gathered at once

    def begin(self) -> State:
        import torch

        flat = torch.stack([self._first(trial.seed) for trial in self._trials]).to(self._rows.samples.device)
        state = {name: torch.zeros_like(flat) for name in ("mean", "first", "second", "best")}
        losses = torch.full((len(flat),), torch.inf, dtype=torch.float64, device=flat.device)
        generator = torch.Generator().manual_seed(self._spec.seed).get_state()
        idle, epoch = torch.zeros_like(losses, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        return state | {"flat": flat, "least": losses, "idle": idle, "epoch": epoch, "generator": generator}

    def _first(self, seed: int) -> "torch.Tensor":
        """[size] as torch.nn.Linear begins, with equal shares."""
        import torch

        form, generator = self._form, torch.Generator().manual_seed(seed)
        flat = torch.zeros(1, form.size)
        torch.nn.init.kaiming_uniform_(form.weight(flat)[0], math.sqrt(5), generator=generator)
        form.bias(flat).uniform_(-1 / math.sqrt(form.inner), 1 / math.sqrt(form.inner), generator=generator)
        return flat[0].to(self._rows.dtype)

    def epoch(self, state: State) -> float:
        """Every row once; the mean objective."""
        import torch

        generator = torch.Generator()
        generator.set_state(state["generator"].cpu())
        flat, done = state["flat"], int(state["epoch"]) * self._steps
        total = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
        late = self._steps * self._spec.epochs - self._averaged
        size, together = self._spec.batch_size, self._batches
        for batch in _batches(self._rows, self._counting, size, together, generator, self._share):
            loss, gradient = self._descend(flat, batch)
            total += loss * batch.size
            done += 1
            self._move(state, gradient, done)
            if done > late:
                state["mean"] += (flat - state["mean"]) / (done - late)
        self._share.sum(total)
        state["epoch"] += 1
        state["generator"] = generator.get_state()
        return float(total.mean()) / self._rows.samples.count

    def _descend(self, flat: "torch.Tensor", batch: "_Batch") -> "tuple[torch.Tensor, torch.Tensor]":
        """This worker's part of the objective [M] over a batch, and the gradient [M, size] of all workers."""
        form, share = self._form, self._share
        kind, smoothing = self._rows.samples.kind, self._spec.label_smoothing
        weight, bias = form.spread(flat)
        loss, *gradients = objective(
            kind, weight, bias, batch.x, batch.targets, batch.weights.T, batch.edges, smoothing
        )
        gradient = form.gather(flat, *gradients)
        share.sum(gradient)
        if self._l2 is not None:
            penalized = flat[:, : form.penalized]
            gradient[:, : form.penalized] += self._l2 * penalized
            loss += self._l2[:, 0] / 2 * penalized.square().sum(1) / share.world
        return loss, gradient

    def _move(
        self, state: State, gradient: "torch.Tensor", step: int, first: float = 0.9, second: float = 0.999
    ) -> None:
        """SGD, or Adam (Kingma and Ba 2015) with the constants of torch.optim.Adam, which takes longer to call than to
        compute."""
        if self._spec.optimizer == "sgd":
            state["flat"].add_(gradient, alpha=-self._spec.lr)
            return
        state["first"].lerp_(gradient, 1 - first)
        state["second"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (state["second"].sqrt() / math.sqrt(1 - second**step)).add_(1e-8)
        state["flat"].addcdiv_(state["first"], scale, value=-self._spec.lr / (1 - first**step))


@dataclass(frozen=True)
class _Batch:
    """This worker's part: x [n, width], targets of n rows, weights [trials, n] that make sums means over all workers,
    edges where rows are in groups; size: how many rows or groups all workers have of it."""

    x: "torch.Tensor"
    targets: "torch.Tensor"
    weights: "torch.Tensor"
    edges: "torch.Tensor | None"
    size: int


def _batches(
    rows: _Rows, counting: _Counting, size: int, together: int, generator: "torch.Generator", share: Share
) -> Iterator[_Batch]:
    """All rows of all workers once, in random order, so many batches at a time; where there are groups, all groups."""
    import torch

    samples = rows.samples
    edges = None if samples.edges is None else samples.edges.cpu()
    for order in torch.randperm(samples.count, generator=generator).split(size * together):
        sizes = [len(batch) for batch in order.split(size)]
        mine = order % share.world == share.rank
        found = order[mine] // share.world
        counts = [int(batch.sum()) for batch in mine.split(size)] if share.world > 1 else sizes
        inner: Sequence[torch.Tensor | None] = [None] * len(sizes)
        if edges is not None:
            found, inner = _rows_of(edges, found, counts)
            counts = [int(part[-1]) for part in inner]
        place = found.to(samples.device)
        weights = counting.in_batches(place, counts, samples, share).split(counts, 1)
        x, targets = rows.take(found).split(counts), samples.targets[place].split(counts)
        yield from map(_Batch, x, targets, weights, inner, sizes)


def _rows_of(
    edges: "torch.Tensor", groups: "torch.Tensor", counts: Sequence[int]
) -> "tuple[torch.Tensor, list[torch.Tensor]]":
    """The rows of some groups one after another, and for so many of the groups each the edges in their rows."""
    import torch

    lengths = edges.diff()[groups]
    ends = lengths.cumsum(0)
    rows = torch.arange(int(lengths.sum())) + torch.repeat_interleave(edges[groups] - ends + lengths, lengths)
    return rows, [torch.nn.functional.pad(part.cumsum(0), (1, 0)) for part in lengths.split(list(counts))]
