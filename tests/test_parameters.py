"""The parameters of heads: derivatives by what they stand for."""

import numpy as np
import torch

from bertray.parameters import Form


def test_the_gradient_of_a_mix_is_the_numerical_one():
    form = Form(2, 6, 3)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, form.size, dtype=torch.float64, generator=generator)
    by_weight, by_bias = (torch.randn(2, 2, *n, dtype=torch.float64, generator=generator) for n in ([6], []))

    def value(flat):
        weight, bias = form.spread(flat)
        return float((weight * by_weight).sum() + (bias * by_bias).sum())

    gradient = form.gather(flat, by_weight, by_bias)
    for place in range(flat.numel()):
        change = torch.zeros_like(flat)
        change.view(-1)[place] = 1e-6
        assert np.isclose((value(flat + change) - value(flat - change)) / 2e-6, float(gradient.view(-1)[place]))
