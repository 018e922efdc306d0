"""Weights of the sites in whole rounds, against the arithmetic written out."""

import math

import pytest
import torch

from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites

GOALS = (1.0, 4.0, -2.0)
"""Where each site's inner steps lead, and what its loss is the distance to."""


class Sites:
    """Three sites with one parameter; an inner step goes a quarter of the way to the site's goal."""

    def __init__(self, config: SemiSyncConfig, count: int = 3) -> None:
        self.models = [torch.nn.Linear(1, 1, bias=False) for _ in range(count)]
        for model in self.models:
            model.weight.data.fill_(0.5)
        self.sites = InProcessSites(count)
        options = [{"measure_loss": lambda site=site: abs(GOALS[site] - self.value(site))} for site in range(count)]
        self.outer = self.sites.outer_loops(config, self.models, options=options)

    def value(self, site: int) -> float:
        return self.models[site].weight.item()

    def step(self, tokens: tuple[int, ...] = (1, 1, 1)) -> list[float]:
        for site, model in enumerate(self.models):
            model.weight.data += 0.25 * (GOALS[site] - model.weight.data)
        self.sites.at_once(lambda site: self.outer[site].step(tokens=tokens[site]))
        return [self.value(site) for site in range(len(self.models))]


def reference(shares, rounds: int, period: int, step=lambda *_: 1.0) -> list[float]:
    """Global values of each round: everything in float64, shares by the losses of the value received last."""
    value, memory, values = 0.5, None, []
    for _ in range(rounds):
        losses = [abs(goal - value) for goal in GOALS]
        ends = [goal + (value - goal) * 0.75**period for goal in GOALS]
        weights, memory = shares(losses, memory)
        size = step(losses, [value - end for end in ends])
        value += size * sum(w * (end - value) for w, end in zip(weights, ends, strict=True)) / sum(weights)
        values.append(value)
    return values


def q_fair(losses, _):
    return [loss**2 for loss in losses], None


def tilted(losses, _):
    return [math.exp(0.5 * loss) for loss in losses], None


def agnostic(losses, shares):
    """Ascent by bisection on the shift that makes the shares sum to 1."""
    shares = shares or [1 / 3] * 3
    moved = [share + 0.2 * loss for share, loss in zip(shares, losses, strict=True)]
    low, high = min(moved) - 1, max(moved)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(0, each - middle) for each in moved) > 1 else (low, middle)
    return shares, [max(0.0, each - low) for each in moved]


POLICIES = {
    "q_fair": (q_fair, {"q": 2.0}),
    "tilted": (tilted, {"tilt": 0.5}),
    "agnostic": (agnostic, {"share_lr": 0.2}),
}


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("name", POLICIES)
def test_rounds_by_the_loss_of_the_received_model(name, codec):
    shares, settings = POLICIES[name]
    config = SemiSyncConfig(
        method="local_sgd",
        sync_every=2,
        weighting=name,
        codec=codec,
        settings={name: settings},
        outlier_threshold=0,
    )
    run = Sites(config)
    found = [run.step() for _ in range(12)][1::2]
    assert all(values[0] == values[1] == values[2] for values in found), "all sites hold the same bits"
    tolerance = 1e-5 if codec == "fp32" else 0.03
    assert [values[0] for values in found] == pytest.approx(reference(shares, 6, 2), abs=tolerance)
    run.sites.close()


def test_the_paper_s_step_of_q_fedavg():
    config = SemiSyncConfig(
        method="local_sgd", sync_every=1, weighting="q_fair", settings={"q_fair": {"q": 1.0, "inner_lr": 0.5}}
    )
    run = Sites(config)
    found = [run.step()[0] for _ in range(4)]

    def step(losses, updates):
        estimates = [(2 * update) ** 2 + 2 * loss for loss, update in zip(losses, updates, strict=True)]
        return 2 * sum(losses) / sum(estimates)

    assert found == pytest.approx(reference(lambda losses, _: (losses, None), 4, 1, step), abs=1e-5)
    run.sites.close()


def test_the_running_average_of_the_global_model():
    run = Sites(SemiSyncConfig(method="diloco", sync_every=1, weighting="agnostic"))
    values = [run.step()[0] for _ in range(5)]
    for outer in run.outer:
        (state,) = outer.state_dict()["states"]["params/0"].values()
        assert state["average"].item() == pytest.approx(sum(values) / 5, rel=1e-5)
        assert state["rounds"].item() == 5
    run.sites.close()


def test_tokens_times_batch():
    """Tokens 8 in two steps and 4 in two: weights 32 and 8 (arXiv 2604.21428)."""
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    sites = InProcessSites(2)
    for model in models:
        model.weight.data.zero_()
    outer = sites.outer_loops(SemiSyncConfig(method="local_sgd", sync_every=2, weighting="tokens_times_batch"), models)
    models[0].weight.data.fill_(3.0)
    models[1].weight.data.fill_(8.0)
    for _ in range(2):
        sites.at_once(lambda site: outer[site].step(tokens=(4, 2)[site]))
    assert [model.weight.item() for model in models] == pytest.approx([(32 * 3 + 8 * 8) / 40] * 2)
    sites.close()


@pytest.mark.parametrize("delay", [0, 1])
def test_a_checkpoint_keeps_what_the_weights_need(delay):
    """Stopped after any step, the rest is as if nothing had been."""
    config = SemiSyncConfig(method="diloco", sync_every=3, weighting="agnostic", fragment_sync_delay=delay)
    whole = Sites(config)
    expected = [whole.step() for _ in range(12)]
    whole.sites.close()
    for stop in (4, 6):
        first = Sites(config)
        for _ in range(stop):
            first.step()
        saved = [(outer.state_dict(), model.weight.detach().clone()) for outer, model in zip(first.outer, first.models)]
        first.sites.close()
        second = Sites(config)
        for (state, weight), outer, model in zip(saved, second.outer, second.models, strict=True):
            outer.load_state_dict(state)
            model.weight.data.copy_(weight)
        second.sites.at_once(lambda site: second.outer[site].join())
        assert [second.step() for _ in range(12 - stop)] == expected[stop:]
        second.sites.close()


def test_weights_by_loss_need_something_that_measures_it():
    sites = InProcessSites(1)
    with pytest.raises(ValueError, match="give measure_loss"):
        sites.outer_loops(SemiSyncConfig(weighting="tilted"), [torch.nn.Linear(1, 1)])
    sites.close()
