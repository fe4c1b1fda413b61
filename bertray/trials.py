"""Trials: heads to fit on the same rows, how much each row counts for each of them, and their mean losses. Knows
nothing of the steps that solvers take, of files, or of Ray.

A trial is one head to fit: its penalty, the fold it leaves out, its seed. All trials see the same vectors, so every
evaluation is one matrix product forward and one back for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bertray.design import Rows
from bertray.heads import objective
from bertray.parameters import Form
from bertray.samples import Samples, Share
from bertray.spec import Head

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]  # of trials under way: another process can go on from it
Record = Callable[[float], None]  # is told the mean objective of all trials
Save = Callable[[State], None]  # is given a state, whose tensors change afterwards


@dataclass(frozen=True)
class Trial:
    """l2: the penalty; fold: rows of this fold are left out (-1: none); seed: of the first weights of adam and sgd."""

    l2: float
    fold: int = -1
    seed: int = 0


class Counting:
    """How much each row counts for each trial. Trials that leave out the same fold have the same weights: these are
    kept once a fold, and copied for some rows at a time.

    folds: that of each trial; left_out: whether it is the rows of its fold that count, instead of all others.
    which: [trials] the row of `weights` [distinct folds, mine rows] that is a trial's.
    """

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


class MeanLoss:
    """The data term over all rows of all workers, for some of the trials: what they minimize, but for the penalty.

    folds, left_out: see `Counting`.
    """

    def __init__(self, rows: Rows, form: Form, folds: Sequence[int], spec: Head, share: Share, left_out: bool = False):
        self._rows, self._form, self._share, self._smoothing = rows, form, share, spec.label_smoothing
        self.kind = rows.samples.kind
        self._counting = Counting(rows.samples, folds, rows.dtype, left_out)
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
