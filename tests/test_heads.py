import numpy as np
import torch

from bertray.heads import LinearHead, linear_objective


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    weight, bias = rng.normal(size=(3, 5)), rng.normal(size=3)
    return [torch.from_numpy(array) for array in (weight, bias, x, y)]


def test_the_objective_is_the_formula():
    weight, bias, x, y = problem()
    logits = x.numpy() @ weight.numpy().T + bias.numpy()
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    expected = -log_p[np.arange(40), y.numpy()].mean() + 0.3 / 2 * (weight.numpy() ** 2).sum()
    assert np.isclose(float(linear_objective(weight, bias, x, y, 0.3, 40)[0]), expected, rtol=1e-12)


def test_its_gradient_is_the_numerical_one():
    weight, bias, x, y = problem()
    _, by_weight, by_bias = linear_objective(weight, bias, x, y, 0.3, 40)
    for parameter, gradient in ((weight, by_weight), (bias, by_bias)):
        flat = parameter.view(-1)
        for place in range(len(flat)):
            values = []
            for step in (1e-6, -2e-6):
                flat[place] += step
                values.append(float(linear_objective(weight, bias, x, y, 0.3, 40)[0]))
            flat[place] += 1e-6
            assert np.isclose((values[0] - values[1]) / 2e-6, float(gradient.view(-1)[place]), rtol=1e-6, atol=1e-8)


def test_shares_add_up_to_the_whole():
    weight, bias, x, y = problem()
    whole = linear_objective(weight, bias, x, y, 0.3, 40)
    parts = [linear_objective(weight, bias, x[r::3], y[r::3], 0.3, 40, 1 / 3) for r in range(3)]
    for total, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.allclose(total, torch.stack(pieces).sum(0), rtol=1e-12)
    assert all(torch.isfinite(part).all() for part in linear_objective(weight, bias, x[:0], y[:0], 0.3, 40, 1 / 3))


def test_probabilities_are_the_softmax_also_of_half_precision_vectors():
    weight, bias, x, _ = problem()
    head = LinearHead(weight.float().numpy(), bias.float().numpy())
    expected = torch.softmax(x @ weight.T + bias, 1).numpy()
    np.testing.assert_allclose(head.probabilities(x.numpy().astype(np.float16)), expected, atol=5e-3)
    huge = head.probabilities(np.full((2, 5), 60_000, np.float16))
    assert np.isfinite(huge).all()
    assert np.allclose(huge.sum(1), 1)
