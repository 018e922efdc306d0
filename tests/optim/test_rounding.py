"""Rounding at random to bfloat16: right on average, and no noise twice."""

import math

import pytest
import torch
from torch import nn

from titan_ext.optim import QHADOPT, QHSGDM, QHAdamW
from titan_ext.optim.rounding import copy_randomly, seed_of


def rounded(values: torch.Tensor, seed: int) -> torch.Tensor:
    kept = torch.empty(values.shape, dtype=torch.bfloat16)
    copy_randomly(kept, values.clone(), seed)
    return kept.float()


@pytest.mark.parametrize("value", [1.0, 1 + 2**-9, -(1 + 2**-12), 3e-38, 1.5e-41, -2e30, 0.0])
def test_a_value_is_kept_on_average_and_never_leaves_its_neighbours(value):
    values = torch.full((200_000,), value)
    got = rounded(values, 5)
    down, up = sorted({*got.tolist()})[0], sorted({*got.tolist()})[-1]
    exact = values[0].double().item()
    assert down <= exact <= up and len({*got.tolist()}) <= 2
    spread = (up - down) / 2
    assert got.double().mean().item() == pytest.approx(exact, abs=4 * spread / math.sqrt(len(values)), rel=1e-12)
    held = values.to(torch.bfloat16).float()
    if torch.equal(held, values):
        assert torch.equal(got, values)


def test_what_is_not_finite_stays_so():
    many_bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    values = torch.cat([many_bits, torch.tensor([math.inf, -math.inf, math.nan])])
    for seed in range(20):
        got = rounded(values, seed)
        assert got.isnan().tolist() == values.isnan().tolist()
        assert got.isinf().tolist() == values.isinf().tolist()


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1].item()


def test_noise_does_not_come_twice():
    """Neither within a tensor nor from one seed to the next, whatever numbers they are made of."""
    values = torch.full((2**18,), 1 + 2**-9)
    ups = {numbers: rounded(values, seed_of(*numbers)) for numbers in [(0,), (1,), (0, 1), (1, 0), (0, 0, 7), (7,)]}
    seen = list(ups.values())
    for index, one in enumerate(seen):
        for other in seen[index + 1 :]:
            assert abs(correlation(one, other)) < 0.02
        for apart in (1, 2, 3, 4, 64, 2**13, 2**16):
            assert abs(correlation(one[:-apart], one[apart:])) < 0.02


@pytest.mark.parametrize("kind", [QHAdamW, QHADOPT, QHSGDM])
def test_equal_parameters_are_rounded_apart(kind):
    """Two parameters with equal values and gradients, and their moments: each has noise of its own, at each step."""
    parameters = [nn.Parameter(torch.full((2**14,), 1.0).bfloat16()) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    for params in (parameters, groups):
        optimizer = kind(params, lr=3e-3)
        errors = []
        for _ in range(3):
            before = [parameter.detach().float() for parameter in parameters]
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.3)
            optimizer.step()
            errors += [parameter.detach().float() - each for parameter, each in zip(parameters, before)]
        moving = [each for each in errors if each.std() > 0]
        assert len(moving) >= 4
        for index, one in enumerate(moving):
            assert all(abs(correlation(one, other)) < 0.06 for other in moving[index + 1 :])


def test_replicas_are_rounded_alike():
    values = torch.randn(1000)
    assert torch.equal(rounded(values, seed_of(3, 1)), rounded(values, seed_of(3, 1)))


def test_pieces_do_not_show(monkeypatch):
    from titan_ext.optim import rounding

    values = torch.randn(10_001)
    whole = rounded(values, 11)
    monkeypatch.setattr(rounding, "_PIECE", 64)
    assert torch.equal(rounded(values, 11), whole)


def test_noise_is_even_over_all_its_values():
    from titan_ext.optim.rounding import _noise

    noise = torch.cat([_noise(0, 2**18, seed_of(seed), torch.device("cpu")) & 0xFFFF for seed in range(16)])
    counts = torch.bincount(noise >> 8, minlength=256).double()
    expected = len(noise) / 256
    # Chi-squared with 255 degrees of freedom: 350 is passed by chance once in 30,000 times.
    assert ((counts - expected) ** 2 / expected).sum() < 350
    for bit in range(16):
        assert (noise >> bit & 1).double().mean().item() == pytest.approx(0.5, abs=0.002)
