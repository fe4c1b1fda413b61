"""Spans: from logits of where an answer starts and ends to the likeliest answer. Pure NumPy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def best_span(given: Floats, lengths: Sequence[float], threshold: float) -> tuple[int, int, float]:
    """The first and last token of the likeliest answer to a question, both 0 for no answer, and how probable it is.

    Args:
        given: [tokens, 2] logits of start and end; token 0 is [CLS], which stands for no answer.
        lengths: the log of how probable answers of 1, 2, ... tokens are; no answer has more.
        threshold: how much likelier no answer has to be, in logits.
    """
    scores, null = _scored(given, lengths), float(given[0].sum())
    best = int(scores.argmax()) if scores.size else 0
    top = float(scores.flat[best]) if scores.size else -np.inf
    if null - top > threshold or not np.isfinite(top):
        return 0, 0, 1.0
    first, last = divmod(best, scores.shape[1])
    every = np.logaddexp.reduce(scores[np.isfinite(scores)])
    return first + 1, last + 1, float(np.exp(top - np.logaddexp(every, null)))


def null_margin(given: Floats, lengths: Sequence[float]) -> float:
    """By how much no answer is likelier than the likeliest answer, in logits."""
    return float(given[0].sum() - _scored(given, lengths).max(initial=-np.inf))


def _scored(given: Floats, lengths: Sequence[float]) -> NDArray[np.float64]:
    """[tokens - 1, tokens - 1] the scores of spans from each token to each."""
    count = len(given) - 1
    scores = given[1:, 0, None].astype(np.float64) + given[None, 1:, 1]
    more = np.arange(count)[None] - np.arange(count)[:, None]
    prior = np.array([*lengths, -np.inf])
    scores += np.where(more < 0, -np.inf, prior[np.clip(more, 0, len(lengths))])
    return scores
