"""Features: which states of which layers a vector consists of, and what a head sees of vectors that belong together.

A feature is written POOLING_LAYER: `mean_6` is the mean over the tokens of the sixth layer's output, `cls_0` what the
embeddings give [CLS]. A vector is one feature or several side by side.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bertray.errors import SpecError

_LAST4 = 4
_REACH = 12  # tokens: a sentence or so


def named(names: Sequence[str]) -> str:
    """Features in a few words."""
    return ", ".join(names) if len(names) < 5 else f"{names[0]} to {names[-1]} ({len(names)} features)"


class Feature(NamedTuple):
    """pooling: how the states of a text or a word become one; layer: behind which layer, 0 being the embeddings."""

    pooling: str
    layer: int

    def __str__(self) -> str:
        return f"{self.pooling}_{self.layer}"


def parse(name: str) -> Feature:
    """The feature of that name."""
    pooling, _, layer = name.rpartition("_")
    return Feature(pooling, int(layer))


def numbers(layers: str | int | Sequence[int], count: int) -> tuple[int, ...]:
    """The layers that `last`, `last4`, `all`, a number or a list of numbers means, rising; negative ones count from the
    last.

    Args:
        count: of layers above the embeddings, which are layer 0.

    Raises:
        SpecError: there is no such layer.
    """
    if isinstance(layers, str):
        return {
            "last": (count,),
            "last4": tuple(range(max(0, count - _LAST4 + 1), count + 1)),
            "all": tuple(range(count + 1)),
        }[layers]
    wanted = [layers] if isinstance(layers, int) else layers
    for layer in wanted:
        if not -count - 1 <= layer <= count:
            raise SpecError(f"encoder.layers must be from 0 (embeddings) to {count} here. Got {layer} instead.")
    return tuple(sorted({layer % (count + 1) for layer in wanted}))


def features(poolings: str | Sequence[str], layers: str | int | Sequence[int], count: int) -> tuple[Feature, ...]:
    """Those poolings of those layers, by layer. The pooler is trained on the last layer, and goes with no other."""
    names = [poolings] if isinstance(poolings, str) else list(dict.fromkeys(poolings))
    found = [Feature(name, layer) for layer in numbers(layers, count) for name in names if name != "pooler"]
    return (*found, *([Feature("pooler", count)] if "pooler" in names else []))


OF_PAIRS, OF_TOKENS = 4, 3  # how many times as wide as a vector is what `related` gives


def related(u: Any, v: Any, around: Any = None) -> Any:
    """What a head sees of two vectors [n, width], side by side, for arrays and tensors.

    Of a pair of texts: u, v, abs(u - v) and u * v (Conneau et al. 2017). Of a token u, its question v and what is
    around the token: u, u * v and around * v; the last tells how much the passage has to do with the question.
    """
    parts = (u, v, abs(u - v), u * v) if around is None else (u, u * v, around * v)
    if hasattr(u, "numpy"):
        import torch

        return torch.cat(parts, 1)
    return np.concatenate(parts, 1)


def with_surroundings(vectors: NDArray[Any], edges: NDArray[np.int64]) -> NDArray[Any]:
    """[words, 2 * features, width] of the vectors [words, features, width] of questions, each before those of its
    tokens: behind these the mean over each token and its neighbours, up to _REACH of them on either side.

    Args:
        edges: [questions + 1] where each question's vectors begin: its own, then its tokens'.
    """
    found = np.zeros((len(vectors), 2 * vectors.shape[1], vectors.shape[2]), vectors.dtype)
    found[:, : vectors.shape[1]] = vectors
    for start, stop in pairwise(edges.tolist()):
        own = vectors[start + 1 : stop].astype(np.float32)
        sums = np.concatenate([np.zeros_like(own[:1]), own.cumsum(0)])
        places = np.arange(len(own))
        first, last = np.maximum(places - _REACH, 0), np.minimum(places + _REACH + 1, len(own))
        found[start + 1 : stop, vectors.shape[1] :] = (sums[last] - sums[first]) / (last - first)[:, None, None]
    return found
