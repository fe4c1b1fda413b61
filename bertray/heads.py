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
) -> "torch.Tensor":
    """The objective over some of `rows` rows: the shares that workers compute add up to the whole.

    Args:
        vectors: [m, width] of the m rows at hand, maybe none.
        classes: [m] class index of each.
        rows: over how many rows the mean is taken.
        share: the part of the penalty that is counted here.
    """
    import torch.nn.functional as F

    logits = F.linear(vectors, weight, bias)
    return F.cross_entropy(logits, classes, reduction="sum") / rows + share * l2 / 2 * weight.square().sum()
