"""Photon's invariants (arXiv 2411.02908) that no other test holds: order of arrival, stateless sites, survivors."""

import itertools

import pytest
import torch

from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites

PERIOD = 3


class Federation:
    """Sites that take real steps of AdamW on data of their own: site k reads the stream ``streams[k]``."""

    def __init__(self, streams: list[int], weights: list[float] | None = None, **settings: object) -> None:
        self.streams = streams
        self.models = []
        for _ in streams:
            torch.manual_seed(0)
            self.models.append(torch.nn.Linear(4, 3))
        self.inner = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in self.models]
        self.sites = InProcessSites(len(streams))
        config = SemiSyncConfig(method="local_sgd", sync_every=PERIOD, **settings)
        options = [{"weight": weight} for weight in weights or [1.0] * len(streams)]
        self.outer = self.sites.outer_loops(config, self.models, self.inner, options)

    def run(self, first: int, steps: int) -> list[torch.Tensor]:
        """Inner steps from the one after ``first``; the parameters of each site."""
        for step in range(first + 1, first + steps + 1):
            for stream, model, inner in zip(self.streams, self.models, self.inner, strict=True):
                inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + stream))
                inner.zero_grad()
                (model(inputs) - inputs[:, :3] * (stream + 1)).square().mean().backward()
                inner.step()
            self.sites.at_once(lambda site: self.outer[site].step(tokens=self.streams[site] + 1))
        return [torch.cat([each.detach().flatten() for each in model.parameters()]).clone() for model in self.models]

    def close(self) -> None:
        self.sites.close()


def test_the_mean_does_not_depend_on_the_order_of_the_sites():
    found = []
    for streams in itertools.permutations([0, 1, 4]):
        federation = Federation(list(streams), weighting="tokens")
        values = federation.run(0, 2 * PERIOD)
        federation.close()
        assert all(torch.equal(value, values[0]) for value in values)
        found.append(values[0])
    for value in found[1:]:
        torch.testing.assert_close(value, found[0], rtol=1e-5, atol=1e-6)


def test_a_stateless_site_depends_on_nothing_but_model_step_and_data():
    """Rounds 2 and 3 of a run equal those of sites that come with fresh optimizers and only the model of round 1."""
    run = Federation([0, 1], reset_inner_optimizer=True)
    run.run(0, PERIOD)
    received = [parameter.detach().clone() for parameter in run.models[0].parameters()]
    expected = run.run(PERIOD, 2 * PERIOD)
    run.close()
    fresh = Federation([0, 1], reset_inner_optimizer=True)
    for model in fresh.models:
        for parameter, value in zip(model.parameters(), received, strict=True):
            parameter.data.copy_(value)
    fresh.sites.at_once(lambda site: fresh.outer[site].join())
    found = fresh.run(PERIOD, 2 * PERIOD)
    fresh.close()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_stateful_site_depends_on_its_optimizer_too():
    """So that the test above could fail."""
    values = []
    for reset in (False, True):
        federation = Federation([0, 1], reset_inner_optimizer=reset)
        values.append(federation.run(0, 2 * PERIOD)[0])
        federation.close()
    assert not torch.equal(*values)


@pytest.mark.parametrize("dropped", [0, 2])
def test_a_site_that_is_left_out_is_as_if_it_had_not_been_there(dropped):
    streams = [0, 1, 2]
    weights = [0.0 if place == dropped else 2.0 for place in range(3)]
    whole = Federation(streams, weights, weighting="site")
    rest = Federation([each for place, each in enumerate(streams) if place != dropped], [2.0] * 2, weighting="site")
    found, expected = whole.run(0, 2 * PERIOD), rest.run(0, 2 * PERIOD)
    whole.close()
    rest.close()
    assert all(torch.equal(value, expected[0]) for value in found)


def test_a_learning_rate_of_zero_moves_nothing():
    federation = Federation([0, 1], outer_optimizer="sgd", outer_lr=0.0)
    before = [parameter.detach().clone() for parameter in federation.models[0].parameters()]
    found = federation.run(0, 2 * PERIOD)
    federation.close()
    assert torch.equal(found[0], torch.cat([each.flatten() for each in before])) and torch.equal(*found)
