"""Solvers: samples to the weights of linear heads, many at once: by Adam or SGD in batches, or by L-BFGS over all rows.
Knows nothing of files or of Ray; what several workers compute is summed by their Share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bertray.descent import in_batches
from bertray.design import ROWS, Rows
from bertray.heads import LinearHead
from bertray.lbfgs import to_optimum
from bertray.parameters import Form
from bertray.samples import Samples, Share
from bertray.spec import Head
from bertray.trials import Record, Save, Trial

if TYPE_CHECKING:
    import torch


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
    rows = Rows.of(samples, share, exact or spec.standardize, spec.standardize, dtype)
    form = Form(samples.outputs, samples.width, samples.blocks if spec.combine == "mix" else 1)
    flat = (to_optimum if exact else in_batches)(rows, form, trials, spec, share, record, start or {}, save)
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
        for rows in torch.nonzero(samples.folds == fold).flatten().split(ROWS):
            x = samples.take(rows, torch.float32)
            logits = torch.addmm(bias.view(-1), x, weight.view(-1, samples.width).T)
            each = logits.view(len(rows), settings, samples.outputs).transpose(0, 1)
            found[:, rows.cpu().numpy()] = each.cpu().numpy()
    return found
