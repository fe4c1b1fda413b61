"""Solvers: samples to the weights of a linear head. Adam and SGD run in batches, L-BFGS over all rows. Knows nothing of
files or of Ray; what several workers compute is summed by their Share."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bertray.heads import LinearHead, linear_objective
from bertray.samples import Samples, Share
from bertray.spec import Head

if TYPE_CHECKING:
    import torch

_LBFGS_ITERATIONS = 1_000
_ROWS = 8_192  # that are gathered, or go through the objective, at once
_FEW = 1 << 23  # operations of a step, below which handing a part to another thread takes longer than doing it
Record = Callable[[float], None]


def solve(samples: Samples, classes: int, spec: Head, share: Share, record: Record) -> LinearHead:
    """Fit a linear head.

    Args:
        classes: how many there are.
        record: is told the objective after each epoch (adam, sgd) or at each evaluation (lbfgs).
    """
    import torch

    torch.manual_seed(spec.seed)
    weights = _Weights(torch.nn.Linear(samples.width, classes), samples.classes.device)
    if spec.optimizer == "lbfgs":
        _to_optimum(weights, samples, spec, share, record)
    else:
        small = 4 * spec.batch_size * weights.flat.numel() < _FEW
        with _threads(1 if small else torch.get_num_threads()):
            _in_batches(weights, samples, spec, share, record)
    return LinearHead(weights.weight.float().cpu().numpy(), weights.bias.float().cpu().numpy())


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


class _Weights:
    """Weight [classes, width] and bias [classes] of a head, and their gradient, each as one flat tensor: a step is one
    operation over it, and so is a sum over workers."""

    def __init__(self, linear: "torch.nn.Linear", device: "torch.device") -> None:
        import torch

        self.flat = torch.cat([linear.weight.detach().view(-1), linear.bias.detach()]).to(device)
        self.gradient = torch.zeros_like(self.flat)
        self._shape = linear.weight.shape

    @property
    def weight(self) -> "torch.Tensor":
        return self.flat[: -self._shape[0]].view(self._shape)

    @property
    def bias(self) -> "torch.Tensor":
        return self.flat[-self._shape[0] :]

    def descend(self, x: "torch.Tensor", y: "torch.Tensor", l2: float, rows: int, share: float) -> "torch.Tensor":
        """The objective over some of `rows` rows; adds its gradient to `gradient`."""
        loss, by_weight, by_bias = linear_objective(self.weight, self.bias, x, y, l2, rows, share)
        self.gradient[: -self._shape[0]] += by_weight.view(-1)
        self.gradient[-self._shape[0] :] += by_bias
        return loss


def _in_batches(weights: _Weights, samples: Samples, spec: Head, share: Share, record: Record) -> None:
    """Adam or SGD. The recorded loss is the mean over the epoch's batches, as they were met.

    At a constant learning rate the last weights are those of a walk around the optimum; the mean over the last
    tenth of the steps is nearer to it (Polyak and Juditsky 1992) and depends less on the seed.
    """
    import torch

    step = _Adam(weights, spec.lr) if spec.optimizer == "adam" else _Sgd(weights, spec.lr)
    generator = torch.Generator().manual_seed(spec.seed)
    left = spec.epochs * math.ceil(samples.count / spec.batch_size)
    averaged, seen = max(1, left // 10), 0
    mean = torch.zeros_like(weights.flat)
    for _ in range(spec.epochs):
        total = torch.zeros((), device=weights.flat.device)
        for x, y, rows in _batches(samples, spec.batch_size, generator, share):
            weights.gradient.zero_()
            loss = weights.descend(x, y, spec.l2, rows, 1 / share.world)
            share.sum(weights.gradient)
            step()
            total += loss * rows
            if left <= averaged:
                seen += 1
                mean += (weights.flat - mean) / seen
            left -= 1
        share.sum(total)
        record(float(total) / samples.count)
    weights.flat = mean


def _batches(
    samples: Samples, size: int, generator: "torch.Generator", share: Share
) -> Iterator[tuple["torch.Tensor", "torch.Tensor", int]]:
    """All rows of all workers once, in random order, in batches: this worker's vectors and classes of each, and how
    many rows it has over all workers."""
    import torch

    for order in torch.randperm(samples.count, generator=generator).split(size * max(1, _ROWS // size)):
        sizes = [len(batch) for batch in order.split(size)]
        mine = order % share.world == share.rank
        rows = order[mine] // share.world
        counts = [int(batch.sum()) for batch in mine.split(size)] if share.world > 1 else sizes
        x, y = samples.take(rows, torch.float32), samples.classes[rows.to(samples.classes.device)]
        yield from zip(x.split(counts), y.split(counts), sizes, strict=True)


@dataclass
class _Sgd:
    weights: _Weights
    lr: float

    def __call__(self) -> None:
        self.weights.flat.add_(self.weights.gradient, alpha=-self.lr)


class _Adam:
    """Kingma and Ba 2015, with the constants of torch.optim.Adam, which takes longer to call than to compute."""

    def __init__(self, weights: _Weights, lr: float, first: float = 0.9, second: float = 0.999) -> None:
        import torch

        self._weights, self._lr, self._decays, self._steps = weights, lr, (first, second), 0
        self._mean, self._square = torch.zeros_like(weights.flat), torch.zeros_like(weights.flat)

    def __call__(self) -> None:
        self._steps += 1
        first, second = self._decays
        gradient = self._weights.gradient
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (self._square.sqrt() / math.sqrt(1 - second**self._steps)).add_(1e-8)
        self._weights.flat.addcdiv_(self._mean, scale, value=-self._lr / (1 - first**self._steps))


def _to_optimum(weights: _Weights, samples: Samples, spec: Head, share: Share, record: Record) -> None:
    """L-BFGS on all rows in float64, to the optimum of the convex objective.

    Nocedal and Wright, Numerical Optimization, chapter 7; torch.optim.LBFGS with its strong Wolfe line search.
    """
    import torch

    weights.flat, weights.gradient = torch.zeros_like(weights.flat).double(), weights.gradient.double()
    starts = range(0, len(samples.classes), _ROWS)
    parts = [slice(start, start + _ROWS) for start in starts]
    held = [samples.take(part, torch.float64) for part in parts] if _fits(samples) else None
    optimizer = torch.optim.LBFGS(
        [weights.flat],
        max_iter=_LBFGS_ITERATIONS,
        max_eval=_LBFGS_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> "torch.Tensor":
        weights.gradient.zero_()
        total = torch.zeros_like(weights.flat[0])
        for number, part in enumerate(parts):
            x = held[number] if held else samples.take(part, torch.float64)
            penalty = spec.l2 if number == 0 else 0.0
            total += weights.descend(x, samples.classes[part], penalty, samples.count, 1 / share.world)
        share.sum(weights.gradient, total)
        weights.flat.grad = weights.gradient
        record(float(total))
        return total

    optimizer.step(closure)


def _fits(samples: Samples) -> bool:
    """Whether the vectors can be held in float64 beside what is held already."""
    return 8 * samples.vectors.numel() <= samples.spare
