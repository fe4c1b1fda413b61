"""Losses of the kinds of heads against plain NumPy, and gradients against numerical derivatives."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bertray import heads
from bertray.heads import LinearHead, objective, parts, probabilities

KINDS = ("softmax", "sigmoid", "squared", "span")
EDGES = [0, 3, 4, 4, 17, 40]


def problem(kind, seed=0, trials=3):
    """weight, bias, x, targets, row weights, edges of 40 rows."""
    rng = np.random.default_rng(seed)
    outputs = 2 if kind == "span" else 3
    weight, bias = rng.normal(size=(trials, outputs, 5)), rng.normal(size=(trials, outputs))
    targets = {
        "softmax": lambda: rng.integers(0, outputs, 40),
        "sigmoid": lambda: rng.integers(0, 2, (40, outputs)).astype(np.float32),
        "squared": lambda: rng.normal(size=(40, outputs)),
        "span": lambda: spread(rng.random((40, 2))),
    }[kind]()
    arrays = (weight, bias, rng.normal(size=(40, 5)), targets, rng.random((40, trials)), np.array(EDGES))
    return [torch.from_numpy(array) for array in arrays]


def spread(shares):
    for first, last in pairwise(EDGES):
        shares[first:last] /= shares[first:last].sum(0)
    return shares


def log_softmax(logits, axis):
    logits = logits - logits.max(axis, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis, keepdims=True))


def losses(kind, logits, targets, smoothing):
    """[rows] by the formulas, of the logits of one head."""
    if kind == "softmax":
        truth = np.eye(logits.shape[1])[targets] * (1 - smoothing) + smoothing / logits.shape[1]
        return -(truth * log_softmax(logits, 1)).sum(1)
    if kind == "sigmoid":
        p = 1 / (1 + np.exp(-logits))
        return -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(1)
    if kind == "squared":
        return ((logits - targets) ** 2).sum(1) / 2
    groups = [log_softmax(logits[a:b], 0) for a, b in pairwise(EDGES) if b > a]
    return -(np.concatenate(groups) * targets).mean(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_value_is_the_formula(kind, smoothing):
    weight, bias, x, targets, row_weights, edges = problem(kind)
    found = objective(kind, weight, bias, x, targets, row_weights, edges, smoothing)[0]
    for trial in range(len(weight)):
        logits = x.numpy() @ weight[trial].numpy().T + bias[trial].numpy()
        expected = (losses(kind, logits, targets.numpy(), smoothing) * row_weights[:, trial].numpy()).sum()
        assert np.isclose(float(found[trial]), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_the_numerical_one(kind, smoothing):
    weight, bias, x, targets, row_weights, edges = problem(kind)

    def value():
        return float(objective(kind, weight, bias, x, targets, row_weights, edges, smoothing)[0].sum())

    _, by_weight, by_bias = objective(kind, weight, bias, x, targets, row_weights, edges, smoothing)
    for parameter, gradient in ((weight, by_weight), (bias, by_bias)):
        flat = parameter.view(-1)
        for place in range(len(flat)):
            values = []
            for step in (1e-6, -2e-6):
                flat[place] += step
                values.append(value())
            flat[place] += 1e-6
            assert np.isclose((values[0] - values[1]) / 2e-6, float(gradient.reshape(-1)[place]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_heads_chunks_and_shares_add_up_to_the_same(kind, monkeypatch):
    weight, bias, x, targets, row_weights, edges = problem(kind)
    whole = objective(kind, weight, bias, x, targets, row_weights, edges)
    for trial in range(len(weight)):
        one = slice(trial, trial + 1)
        alone = objective(kind, weight[one], bias[one], x, targets, row_weights[:, one], edges)
        for stacked, single in zip(whole, alone, strict=True):
            torch.testing.assert_close(stacked[one], single)
    monkeypatch.setattr(heads, "_LEAST", 1)
    monkeypatch.setattr(heads, "_CELLS", 5 * weight[..., 0].numel())
    for in_chunks, at_once in zip(objective(kind, weight, bias, x, targets, row_weights, edges), whole, strict=True):
        torch.testing.assert_close(in_chunks, at_once)
    shares = [
        objective(kind, weight, bias, x[rows], targets[rows], row_weights[rows], part)
        for rows, part in ((slice(0, 17), edges[:5]), (slice(17, 40), edges[4:] - 17))
    ]
    for total, pieces in zip(whole, zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(total, torch.stack(pieces).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_row_all_is_zero(kind):
    weight, bias, x, targets, row_weights, _ = problem(kind)
    for part in objective(kind, weight, bias, x[:0], targets[:0], row_weights[:0], torch.tensor([0])):
        assert not part.any()


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_stay_finite(kind):
    weight, bias, x, targets, row_weights, edges = problem(kind)
    for part in objective(kind, weight * 1e4, bias, x, targets, row_weights, edges):
        assert torch.isfinite(part).all()


def test_parts_never_cut_a_group(monkeypatch):
    monkeypatch.setattr(heads, "_LEAST", 1)
    edges = torch.tensor([0, 3, 4, 4, 17, 18, 20, 21, 22, 40])
    found = list(parts(40, 5, edges))
    assert [rows.start for rows, _ in found[1:]] == [rows.stop for rows, _ in found[:-1]]
    assert (found[0][0].start, found[-1][0].stop) == (0, 40)
    joined = torch.cat([inner + rows.start for rows, inner in found]).unique()
    assert joined.tolist() == edges.unique().tolist()
    assert len(found) > 3


def test_probabilities_are_the_softmax_also_of_half_precision_vectors():
    weight, bias, x = problem("softmax")[:3]
    head = LinearHead(weight[0].float().numpy(), bias[0].float().numpy())
    expected = torch.softmax(x @ weight[0].T + bias[0], 1).numpy()
    np.testing.assert_allclose(head.probabilities(x.numpy().astype(np.float16)), expected, atol=5e-3)
    huge = head.probabilities(np.full((2, 5), 60_000, np.float16))
    assert np.isfinite(huge).all()
    assert np.allclose(huge.sum(1), 1)


def test_probabilities_of_the_other_kinds():
    logits = np.array([[-1000, -1, 0, 2, 1000]], np.float32)
    expected = 1 / (1 + np.exp(-logits[:, 1:4].astype(np.float64)))
    found = probabilities("sigmoid", logits)
    np.testing.assert_allclose(found[:, 1:4], expected, rtol=1e-6)
    assert found[0, 0] == 0
    assert found[0, 4] == 1
    assert probabilities("squared", logits) is logits
