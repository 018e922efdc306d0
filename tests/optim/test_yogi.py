"""Yogi against its equations in float64 and plain loops."""

import math

import pytest
import torch

from titan_ext.optim import Yogi


def test_equals_the_equations():
    torch.manual_seed(0)
    lr, beta1, beta2, eps = 0.05, 0.9, 0.99, 1e-3
    model = torch.nn.ParameterList([torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)])
    x = torch.cat([each.detach().flatten() for each in model]).tolist()
    m, v = [0.0] * 10, [eps**2] * 10
    optimizer = Yogi(model.parameters(), lr=lr, betas=(beta1, beta2), eps=eps)
    for step in range(40):
        g = torch.randn(10, dtype=torch.float64) * (1 + step % 5)
        for each, part in zip(model, g.split([6, 4])):
            each.grad = part.view_as(each).clone()
        optimizer.step()
        for i, gi in enumerate(g.tolist()):
            m[i] = beta1 * m[i] + (1 - beta1) * gi
            v[i] -= (1 - beta2) * gi * gi * math.copysign(1, v[i] - gi * gi)
            x[i] -= lr * m[i] / (math.sqrt(v[i]) + eps)
        assert torch.cat([each.detach().flatten() for each in model]).tolist() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("wrong", [dict(lr=-1), dict(betas=(1.0, 0.9)), dict(eps=0)])
def test_wrong_values_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Yogi([torch.nn.Parameter(torch.zeros(1))], **wrong)
