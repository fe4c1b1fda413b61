"""Linear heads: forward, losses and their gradients, for many heads over the same vectors at once. Knows nothing of
Ray, of files, or of how a head is fitted.

A head on vectors x [n, width] with weight W [outputs, width] and bias b [outputs] has logits z = x W' + b [n, outputs].
What they mean is the head's kind:

    softmax   p = softmax(z)             one of the outputs is true
    sigmoid   p = 1 / (1 + exp(-z))      each output is true or not, by itself
    squared   z itself                   numbers
    span      p = softmax over the rows  of a group: where something starts (output 0) and ends (output 1)

A fit minimizes mean_i loss_i + l2/2 * sum(W^2). The bias is not penalized, as in scikit-learn's LogisticRegression,
whose C is 1 / (l2 * n), and its Ridge, whose alpha is l2 * n.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
_CELLS = 1 << 20  # logits at once: few enough to stay in cache, enough to multiply fast
_LEAST = 256  # rows at once


@dataclass(frozen=True)
class LinearHead:
    """weight: [outputs, width]; bias: [outputs]."""

    weight: Floats
    bias: Floats

    def logits(self, vectors: NDArray[np.floating]) -> Floats:
        """[n, outputs] of vectors [n, width]."""
        return vectors.astype(np.float32, copy=False) @ self.weight.T + self.bias

    def probabilities(self, vectors: NDArray[np.floating]) -> Floats:
        """[n, outputs] of vectors [n, width], for the kind softmax; each row sums to 1."""
        return probabilities("softmax", self.logits(vectors))


def probabilities(kind: str, logits: Floats) -> Floats:
    """[n, outputs] of logits [n, outputs]: what softmax or sigmoid makes of them; of the kind squared, themselves."""
    if kind == "softmax":
        found = np.exp(logits - logits.max(axis=1, keepdims=True))
        found /= found.sum(axis=1, keepdims=True)
        return found
    if kind == "sigmoid":  # by tanh, which does not overflow
        return 0.5 + 0.5 * np.tanh(0.5 * logits)
    return logits


def objective(
    kind: str,
    weight: "torch.Tensor",
    bias: "torch.Tensor",
    x: "torch.Tensor",
    targets: "torch.Tensor",
    row_weights: "torch.Tensor",
    edges: "torch.Tensor | None" = None,
    smoothing: float = 0.0,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """The data term sum_i w[i, m] * loss_i of each of M heads, and its gradient: shares of rows add up to the whole.

    With e [n, M, outputs] the derivative by logits, the gradient is e' x in the weight and the sum of e in the bias.
    All heads share one matrix product forward and one back. Written out because autograd takes longer over a small
    batch than the arithmetic, and over a large one more memory.

    Args:
        weight, bias: [M, outputs, width] and [M, outputs].
        x: [n, width], maybe without a row.
        targets: softmax: [n] classes; sigmoid, squared: [n, outputs]; span: [n, 2] the share of the truth in each row.
        row_weights: [n, M], fastest as the transpose of a tensor [M, n].
        edges: span: [groups + 1], rows edges[g]:edges[g+1] are a group.
        smoothing: softmax: the part of the truth that is spread evenly over all classes.

    Returns:
        [M] in float64, [M, outputs, width] and [M, outputs].
    """
    import torch

    heads, outputs, width = weight.shape
    flat = weight.reshape(-1, width)
    total: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for rows, inner in parts(len(x), _CELLS // len(flat), edges if kind == "span" else None):
        some, truth, weights = x[rows], targets[rows], row_weights[rows].T
        logits = torch.addmm(bias.reshape(-1, 1), flat, some.T).view(heads, outputs, -1)
        if kind == "softmax":
            losses, errors = _softmax(logits, truth, weights, smoothing)
        elif kind == "sigmoid":
            losses, errors = _sigmoid(logits, truth, weights)
        elif kind == "squared":
            losses, errors = _squared(logits, truth, weights)
        else:
            losses, errors = _span(logits, truth, weights, inner)
        found = (losses, (errors.view(len(flat), -1) @ some).view_as(weight), errors.sum(2))
        total = found if total is None else (total[0] + found[0], total[1] + found[1], total[2] + found[2])
    if total is None:
        nothing = torch.zeros(heads, dtype=torch.float64, device=x.device)
        return nothing, torch.zeros_like(weight), torch.zeros_like(bias)
    return total


def parts(count: int, size: int, edges: "torch.Tensor | None" = None) -> "Iterator[tuple[slice, torch.Tensor | None]]":
    """Slices of about so many rows that together are all, and the edges inside of each: no group is cut."""
    import torch

    size = max(_LEAST, size)
    if edges is None:
        size = math.ceil(count / max(1, math.ceil(count / size))) or 1  # none is much smaller than the others
        yield from ((slice(start, min(start + size, count)), None) for start in range(0, count, size))
        return
    groups = torch.nonzero(torch.diff(edges // size)).flatten().tolist()
    for first, last in zip([0, *groups], [*groups, len(edges) - 1], strict=True):
        inner = edges[first : last + 1]
        if inner[-1] > inner[0]:
            yield slice(int(inner[0]), int(inner[-1])), inner - inner[0]


# Each of the following takes logits z [M, outputs, n], the truth of the rows and their weights w [M, n], and gives the
# sum over rows [M] and its derivative by z [M, outputs, n]. Rows come last: what runs over outputs is then done for
# many rows at a time, which matters where outputs are few.


def _softmax(
    logits: "torch.Tensor", classes: "torch.Tensor", weights: "torch.Tensor", smoothing: float
) -> "tuple[torch.Tensor, torch.Tensor]":
    """-sum_c t_c log p_c with t = (1 - smoothing) onehot(y) + smoothing / C; the derivative is p - t."""
    import torch

    log_p = torch.log_softmax(logits, 1)
    chosen = classes.expand(len(log_p), 1, -1)
    gains = log_p.gather(1, chosen).squeeze(1)
    if smoothing:
        gains.lerp_(log_p.mean(1), smoothing)
    errors = log_p.exp_()
    errors.scatter_add_(1, chosen, errors.new_full((1, 1, 1), smoothing - 1).expand(chosen.shape))
    if smoothing:
        errors -= smoothing / errors.shape[1]
    return -_weighted(gains, weights), errors.mul_(weights.unsqueeze(1))


def _sigmoid(
    logits: "torch.Tensor", targets: "torch.Tensor", weights: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """sum_o log(1 + exp(z_o)) - t_o z_o; the derivative is p - t."""
    import torch

    truth = targets.T.to(logits.dtype).expand_as(logits)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1)
    return _weighted(losses, weights), logits.sigmoid_().sub_(truth).mul_(weights.unsqueeze(1))


def _squared(
    logits: "torch.Tensor", targets: "torch.Tensor", weights: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """sum_o (z_o - t_o)^2 / 2; the derivative is z - t."""
    errors = logits.sub_(targets.T.to(logits.dtype))
    return _weighted(errors.square().sum(1), weights) / 2, errors.mul_(weights.unsqueeze(1))


def _span(
    logits: "torch.Tensor", targets: "torch.Tensor", weights: "torch.Tensor", edges: "torch.Tensor | None"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """-1/2 sum_i t_i log p_i for start and for end, p the softmax over the rows of a group.

    The derivative is (p_i sum_j w_j t_j - w_i t_i) / 2: the sum is over the group, so it is w p - w t where a group's
    rows weigh the same.
    """
    import torch

    assert edges is not None
    lengths = edges.diff()
    group = torch.repeat_interleave(torch.arange(len(lengths), device=edges.device), lengths)

    def summed(values: "torch.Tensor") -> "torch.Tensor":
        return values.new_zeros(*values.shape[:2], len(lengths)).index_add_(2, group, values)

    top = logits.new_full((*logits.shape[:2], len(lengths)), -torch.inf)
    top.scatter_reduce_(2, group.expand_as(logits), logits, "amax")
    log_p = logits.sub_(top[:, :, group])
    log_p -= summed(log_p.exp()).log_()[:, :, group]
    truth = targets.T.to(logits.dtype) * weights.unsqueeze(1) / 2
    losses = (log_p * truth).sum((1, 2)).double()
    return -losses, log_p.exp_().mul_(summed(truth)[:, :, group]).sub_(truth)


def _weighted(losses: "torch.Tensor", weights: "torch.Tensor") -> "torch.Tensor":
    """[M] sums of losses [M, n]; in float64, as what many parts add up to is too coarse in float32 to compare steps."""
    return (losses * weights).sum(1).double()
