import numpy as np
import pytest

from bertray.spans import best_span, null_margin

EVEN = tuple(np.log(np.full(4, 0.25)))  # answers of up to four tokens, all lengths alike


def logits(start, end):
    return np.array([start, end], np.float32).T


def test_the_likeliest_span():
    given = logits([0, 0, 5, 0, 0, 0], [0, 0, 0, 0, 4, 0])
    first, last, score = best_span(given, EVEN, 1e9)
    assert (first, last) == (2, 4)
    every = sum(
        np.exp(given[i, 0] + given[j, 1]) * 0.25 for i in range(1, 6) for j in range(i, min(6, i + 4))
    ) + np.exp(given[0].sum())
    assert score == pytest.approx(np.exp(9) * 0.25 / every, rel=1e-5)


def test_the_end_is_not_before_the_start_nor_too_far():
    assert best_span(logits([0, 0, 9, 0], [0, 9, 0, 0]), EVEN, 1e9)[:2] in ((2, 2), (2, 3), (1, 1))
    far = logits([0, 9, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 9])
    first, last, _ = best_span(far, EVEN, 1e9)
    assert last - first < 4


def test_lengths_that_are_likely_win():
    given = logits([0, 1, 1, 1], [0, 1, 1, 1])
    assert best_span(given, tuple(np.log([0.01, 0.98, 0.01])), 1e9)[:2] == (1, 2)
    assert best_span(given, tuple(np.log([0.98, 0.01, 0.01])), 1e9)[:2] == (1, 1)


def test_no_answer_beyond_the_threshold():
    given = logits([6, 1, 0], [6, 1, 0])
    margin = null_margin(given, EVEN)
    assert margin == pytest.approx(12 - 2 - np.log(0.25), abs=1e-5)
    assert best_span(given, EVEN, margin - 0.1)[:2] == (0, 0)
    assert best_span(given, EVEN, margin + 0.1)[:2] == (1, 1)


def test_without_any_token_there_is_no_answer():
    assert best_span(logits([0], [0]), EVEN, 1e9) == (0, 0, 1.0)
    lost = logits([0, -np.inf, -np.inf], [0, -np.inf, -np.inf])  # all was cut off
    assert best_span(lost, EVEN, 1e9)[:2] == (0, 0)
    assert null_margin(lost, EVEN) == np.inf
