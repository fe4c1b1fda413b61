"""The head kinds: forward, loss and decode. Knows nothing of Ray, of files, or of how a head is fitted.

The linear head on vectors x [n, width] with weight W [classes, width] and bias b [classes]:

    logits         z = x W' + b                            [n, classes]
    probabilities  p = softmax(z)                          [n, classes]
    objective      mean_i -log p[i, y_i] + l2/2 * sum(W^2)

The bias is not penalized, as in scikit-learn's LogisticRegression, whose C is 1 / (l2 * n).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LinearHead:
    """weight: [classes, width]; bias: [classes]."""

    weight: Floats
    bias: Floats

    def probabilities(self, vectors: NDArray[np.floating]) -> Floats:
        """[n, classes] of vectors [n, width]; each row sums to 1."""
        logits = vectors.astype(np.float32) @ self.weight.T + self.bias
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        return logits


def linear_objective(
    weight: "torch.Tensor",
    bias: "torch.Tensor",
    vectors: "torch.Tensor",
    classes: "torch.Tensor",
    l2: float,
    rows: int,
    share: float = 1.0,
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """The objective and its gradient over some of `rows` rows: the shares that workers compute add up to the whole.

    With e = (p - onehot(y)) / rows, the gradient is e' x + l2 W in the weight and the sum of e over rows in the bias.
    Written out because autograd takes longer over a small batch than the arithmetic.

    Args:
        vectors: [m, width] of the m rows at hand, maybe none.
        classes: [m] class index of each.
        rows: over how many rows the mean is taken.
        share: the part of the penalty that is counted here.

    Returns:
        The objective, and its derivatives [classes, width] and [classes].
    """
    import torch

    log_p = torch.log_softmax(torch.addmm(bias, vectors, weight.T), 1)
    chosen = classes.unsqueeze(1)
    loss = log_p.gather(1, chosen).sum() / -rows
    error = log_p.exp_()
    error.scatter_add_(1, chosen, error.new_full((1, 1), -1.0).expand(len(classes), 1))
    error /= rows
    by_weight, by_bias = error.T @ vectors, error.sum(0)
    if l2:
        loss = loss + share * l2 / 2 * weight.square().sum()
        by_weight += share * l2 * weight
    return loss, by_weight, by_bias
