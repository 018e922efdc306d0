"""Numbers at the edge: what the sites come to is a number everywhere, or is left out, and what no hash covers is told."""

import math

import pytest
import torch
from torch import nn

from titan_ext.errors import RunError
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites

LARGEST = torch.finfo(torch.float32).max
AVERAGE = {"method": "local_sgd", "sync_every": 2}
STEP = {"method": "diloco", "sync_every": 2, "outer_lr": 1.0, "outer_momentum": 0.0, "nesterov": False}


def run(config, changes, steps=4, weights=(1.0, 1.0), make=lambda: nn.Linear(2, 1, bias=False)):
    """Values of every site, its outer loop and the contributors of each round, after inner steps that add ``changes``.

    Args:
        changes: by site and inner step what is added to every parameter; 1 where nothing is said.
    """
    sites, models = InProcessSites(len(weights)), [make() for _ in weights]
    for model in models:
        for parameter in model.parameters():
            parameter.data.zero_()
    loops = sites.outer_loops(SemiSyncConfig(**config), models, options=[{"weight": weight} for weight in weights])
    contributors = []
    for step in range(1, steps + 1):
        for site, model in enumerate(models):
            for parameter in model.parameters():
                parameter.data += changes.get((site, step), 1.0)
        rounds = loops[0].ledger.rounds
        sites.at_once(lambda site: loops[site].step())
        if loops[0].ledger.rounds > rounds:
            contributors.append(len(loops[0].ledger.last.contributors))
    sites.close()
    return [next(model.parameters()).flatten()[0].item() for model in models], loops, contributors


@pytest.mark.parametrize(
    "config, changes, weights",
    [
        (AVERAGE, {(0, 1): LARGEST, (1, 1): LARGEST}, (1.0, 1.0)),  # their sum
        (STEP, {(0, 1): -LARGEST, (1, 1): -LARGEST}, (1.0, 1.0)),
        (AVERAGE | {"codec": "bf16"}, {(0, 1): LARGEST}, (1.0, 1.0)),  # it rounds up to infinity
        (AVERAGE | {"weighting": "site"}, {}, (1e-300, 1e-300)),  # zero by zero
    ],
)
def test_a_mean_that_is_not_finite_is_left_out(config, changes, weights):
    values, _, contributors = run(config, changes, steps=2, weights=weights)
    assert values == [0.0, 0.0] and contributors == [0]
    if len(set(weights)) == 1 and weights[0] == 1.0:
        values, loops, contributors = run(config, changes, steps=4, weights=weights)
        assert values == [2.0, 2.0] and contributors == [0, 2], "the next round is as any other"
        assert loops[0].shared_state_sha256() == loops[1].shared_state_sha256()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [AVERAGE, STEP, AVERAGE | {"codec": "int8"}, AVERAGE | {"aggregation": "median"}])
def test_a_site_whose_work_is_not_finite_is_left_out(config, value):
    values, _, contributors = run(config, {(0, 1): value}, steps=2)
    assert values[0] == values[1] == pytest.approx(2.0, rel=0.02) and contributors == [1]


def test_means_that_are_never_finite_end_the_run():
    always = {(site, step): LARGEST for site in (0, 1) for step in range(1, 20, 2)}
    with pytest.raises(RunError, match="finite in 4 rounds one after the other"):
        run(AVERAGE, always, steps=12)


def test_an_outer_step_beyond_all_numbers_ends_the_run():
    with pytest.raises(RunError, match="not finite after the outer step at inner step 2: .*outer_lr first"):
        run(STEP | {"outer_lr": 1e30}, {(0, 1): 1e20, (1, 1): 1e20}, steps=2)


@pytest.mark.parametrize("steps, since", [(3, 1), (4, 0), (1, 1)])
def test_what_the_shared_state_does_not_contain_is_counted(steps, since):
    _, loops, _ = run(AVERAGE, {}, steps=steps)
    assert [loop.steps_past_shared() for loop in loops] == [since, since]
    _, loops, _ = run({"method": "noloco", "sync_every": 2}, {}, steps=2)
    assert loops[0].steps_past_shared() == 0, "its sites have nothing in common before the end"


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2, dtype=torch.int64), persistent=False)


def test_buffers_without_a_mean_are_told():
    _, loops, _ = run(AVERAGE, {}, make=Counting)
    assert loops[0].own_buffers() == ["mask", "seen"]


class Complex(nn.Module):
    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.phase = nn.Parameter(torch.full((2,), 1 + 2j), requires_grad=trained)


def test_complex_parameters_are_refused_if_they_are_trained():
    with pytest.raises(ValueError, match="phase is complex"):
        run(AVERAGE, {}, make=lambda: Complex(True))
