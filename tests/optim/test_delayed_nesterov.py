"""Delayed Nesterov (arXiv 2401.09135) against its equations."""

import random

import pytest
import torch

from titan_ext.optim.delayed_nesterov import DelayedNesterov
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.testing import InProcessSites


def reference(value: float, gradients: list[float], lr: float, beta: float, cycle: int, c: float) -> list[float]:
    """Algorithm 3 in float64."""
    momentum, buffer, seen = 0.0, 0.0, []
    for place, gradient in enumerate(gradients):
        buffer += gradient
        if (place + 1) % cycle == 0:
            momentum = beta * momentum + buffer / cycle
            value -= lr * ((1 - c * cycle + c) * beta * momentum + gradient / cycle)
            buffer = 0.0
        else:
            value -= lr * (c * beta * momentum + gradient / cycle)
        seen.append(value)
    return seen


def stepped(gradients: list[float], **settings: float) -> list[float]:
    parameter = torch.tensor([1.0])
    optimizer, seen = DelayedNesterov([parameter], **settings), []
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        seen.append(parameter.item())
    return seen


@pytest.mark.parametrize("c", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("seed", range(3))
def test_the_equations(seed, c):
    generator = random.Random(seed)
    gradients = [generator.gauss(0, 1) for _ in range(14)]
    found = stepped(gradients, lr=0.7, momentum=0.9, cycle=4, spread=c)
    assert found == pytest.approx(reference(1.0, gradients, 0.7, 0.9, 4, c), abs=1e-5)


def test_a_cycle_of_equal_speeds_is_a_step_of_nesterov_with_the_mean():
    """Scalar 1.0, learning rate 0.7, momentum 0.9, mean 0.1 each round: 0.867, 0.6773, 0.43657."""
    gradients = [0.04, 0.16, 0.1, 0.1] * 3
    assert stepped(gradients, lr=0.7, momentum=0.9, cycle=4)[3::4] == pytest.approx([0.867, 0.6773, 0.43657], abs=1e-5)
    assert stepped([0.1] * 3, lr=0.7, momentum=0.9, cycle=1) == pytest.approx([0.867, 0.6773, 0.43657], abs=1e-5)


def test_a_momentum_that_every_arrival_renews_moves_several_times_as_far():
    """Four equal gradients one by one: 12.14 lr g against 1.9 of one averaged step (momentum 0.9)."""
    parameter = torch.zeros(1)
    torch_step = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, nesterov=True)
    for _ in range(4):
        parameter.grad = torch.ones(1)
        torch_step.step()
    assert -parameter.item() == pytest.approx(12.14, abs=0.01)
    assert 1.0 - stepped([1.0] * 4, lr=1.0, momentum=0.9, cycle=4)[-1] == pytest.approx(1.9, abs=1e-5)


def test_as_outer_optimizer_of_sampled_sites():
    """One of two sites contributes to each round; all sites hold the same, and it is what the equations say."""
    settings = dict(
        sync_every=1, outer_optimizer="delayed_nesterov", outer_lr=0.5, settings={"delayed_nesterov": {"cycle": 2}}
    )
    config = SemiSyncConfig(method="diloco", sites_per_round=1, **settings)
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    for model in models:
        model.weight.data.fill_(1.0)
    sites = InProcessSites(2)
    outer = sites.outer_loops(config, models, options=[{"name": "a"}, {"name": "b"}])
    gradients, found = [], []
    for _ in range(7):
        taken = [not each.sits_out for each in outer]
        for site, model in enumerate(models):
            if taken[site]:
                model.weight.data -= site + 1.0
        gradients.append(sum(site + 1.0 for site in range(2) if taken[site]) / sum(taken))
        sites.at_once(lambda site: outer[site].step())
        assert models[0].weight.item() == models[1].weight.item()
        found.append(models[0].weight.item())
    assert found == pytest.approx(reference(1.0, gradients, 0.5, 0.9, 2, 0.0), abs=1e-5)
    assert {1.0, 2.0} <= set(gradients), "both sites were sampled alone"
    sites.close()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"cycle": 0}, "cycle = 0: must be at least 1"),
        ({"cycle": 4, "spread": 0.3}, "spread = 0.3: must be from 0 to 1 / cycle"),
    ],
)
def test_bad_settings(settings, problem):
    with pytest.raises(ValueError, match=problem):
        resolve(SemiSyncConfig(outer_optimizer="delayed_nesterov", settings={"delayed_nesterov": settings}))
    with pytest.raises(ValueError, match="must be"):
        DelayedNesterov([torch.zeros(1)], lr=-1.0)
