"""Explanations: how much each word of a text counted for an answer.

By occlusion (Zeiler and Fergus 2014; for text Li et al. 2016, "Understanding neural networks through representation
erasure"): the answer is asked for again without each word, and what it falls by is what the word counted. That needs
nothing but answers, whatever runs the encoder. Knows nothing of encoders or heads.
"""

import re
from itertools import pairwise
from typing import NamedTuple

_MOST = 128  # pieces that a text is cut into
_PIECE = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]+")


class Pieces(NamedTuple):
    """spans: where the words of a text begin and end, in characters; without: the text without each of them."""

    spans: list[tuple[int, int]]
    without: list[str]


def pieces(text: str) -> Pieces:
    """The words of a text, and its punctuation; of a long text runs of them, 128 in all."""
    found = [match.span() for match in _PIECE.finditer(text)]
    if len(found) > _MOST:
        edges = [round(i * len(found) / _MOST) for i in range(_MOST + 1)]
        found = [(found[start][0], found[stop - 1][1]) for start, stop in pairwise(edges)]
    return Pieces(found, [text[:start] + text[stop:] for start, stop in found])
