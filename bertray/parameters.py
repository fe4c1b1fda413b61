"""Parameters: the numbers of a linear head in one flat tensor, as solvers move them, where blocks of vectors may be
mixed. Knows nothing of rows, of losses, or of how a head is fitted."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Form:
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
