"""L-BFGS: many trials at once to their optimum, over all rows, with a rough inverse of their curvature to begin with.
Knows nothing of files or of Ray; what several workers compute is summed by their Share."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bertray.design import Rows, decomposed, second_moments, threads, worker_mean
from bertray.parameters import Form
from bertray.samples import Share
from bertray.spec import Head
from bertray.trials import MeanLoss, Record, Save, Trial

if TYPE_CHECKING:
    import torch

_EVALUATIONS = 1_000  # at most
_HISTORY = 10  # steps that are remembered
_IDLE = 20  # evaluations without progress, after which rounding is what keeps a trial from its tolerance
_WIDE = 4_096  # numbers a vector, above which a matrix that wide takes too long to decompose
_ROOM = 1 << 28  # bytes that what is remembered may always take


def to_optimum(
    rows: Rows,
    form: Form,
    trials: Sequence[Trial],
    spec: Head,
    share: Share,
    record: Record,
    start: Mapping[str, "torch.Tensor"],
    save: Save | None,
) -> "torch.Tensor":
    """[M, size] at the optimum of each trial, as many trials at a time as there is room for.

    Args:
        record: is told the mean objective after each evaluation.
        start: a state that `save` was given: it is started from there, with nothing remembered.
        save: is given the points so far, every 20 evaluations.
    """
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
    together = max(1, max(_ROOM, worker_mean(rows.samples.spare, rows, share) // 2) // each)
    for first in range(0, len(trials), together):
        some = trials[first : first + together]
        mean = MeanLoss(rows, form, [trial.fold for trial in some], spec, share)
        l2 = torch.tensor([trial.l2 for trial in some], dtype=torch.float64, device=place)
        with threads(1 if rows.cores > 1 else torch.get_num_threads()):
            _Minimizer(flat[first : first + together], l2, mean, precondition, form).run(tell)
    return flat


class _Minimizer:
    """L-BFGS for many trials at once, each with its own direction and step (Nocedal and Wright, Numerical Optimization,
    algorithm 7.4), by the line search of Lewis and Overton 2013 (Nonsmooth optimization via quasi-Newton methods,
    algorithm 2.6): an interval that is doubled or halved until the step is long enough and falls enough.

    No trial waits for another: at every evaluation each is at a point of its own line search, or starts the next one.
    A trial that has arrived drops out. `flat` holds the best points.

    A: the trials that are still under way. point, gradient, direction: [A, size]; all others: [A].
    """

    def __init__(
        self, flat: "torch.Tensor", l2: "torch.Tensor", mean: MeanLoss, precondition: "_Curvature", form: Form
    ) -> None:
        import torch

        self._flat, self._mean, self._precondition, self._form, self._l2 = flat, mean, precondition, form, l2
        self._coarse = torch.finfo(flat.dtype).eps
        self._tolerance = torch.full((len(flat),), 1e-7 if flat.dtype == torch.float64 else 1e-5, device=flat.device)
        self.active = torch.arange(len(flat), device=flat.device)
        self.history: deque[tuple[torch.Tensor, ...]] = deque(maxlen=_HISTORY)  # steps, changes of gradient, 1 / s'y

    def run(self, tell: Record) -> None:
        """Until all trials have arrived, or no longer get on."""
        import torch

        self._begin()
        losses = self.value.clone()
        tell(float(losses.mean()))
        for _ in range(_EVALUATIONS - 1):
            self._drop((self.steepest <= self._tolerance[self.active]) | (self.idle >= _IDLE))
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
        if self._mean.kind == "squared":  # whose gradients are as small as the numbers to be told
            self._tolerance = self._tolerance * self.steepest.clamp(max=1)
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

    def __init__(self, rows: Rows, form: Form, share: Share) -> None:
        import torch

        self._form, kind = form, rows.samples.kind
        self._curved = {"softmax": 1 / max(2, form.outputs), "sigmoid": 1 / 4, "squared": 1.0, "span": 1 / 2}[kind]
        self._basis: torch.Tensor | None = None
        if form.inner > _WIDE:
            values = second_moments(rows, form.blocks, share)
        else:
            values, basis = decomposed(second_moments(rows, form.blocks, share, crossed=True), share)
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
