"""Many sources on few virtual sites come to what the equations say, wherever they are placed."""

import pytest
import torch

from titan_ext.errors import UserError
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.plan.sampling import sampled_sources
from titan_ext.semi_sync.testing.population import Population

SIZES = [1 + (7 * source) % 5 for source in range(40)]


def pulled(value: float, source: int, round_: int) -> float:
    """What a source makes of a parameter: steps towards its own number."""
    for _ in range(SIZES[source]):
        value = value - 0.1 * (value - (source % 9 + 0.1 * round_))
    return value


def population(sites, **settings):
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(sites)]
    for model in models:
        model.weight.data.fill_(0.5)

    def train(model, source, round_):
        model.weight.data.fill_(pulled(model.weight.item(), source, round_))
        return float(SIZES[source])

    own = {"method": "local_sgd", "sync_every": 1, "outlier_threshold": 0.0} | settings.pop("outer", {})
    return Population(SemiSyncConfig(**own), models, SIZES, train, **settings)


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"learns": False}, {"per_round": 7, "seed": 3}, {"per_round": 1}], ids=str)
def test_a_round_is_the_weighted_mean_over_its_sources(sites, settings):
    run, value = population(sites, **settings), 0.5
    for round_ in range(5):
        found = run.round()
        drawn = sampled_sources(40, settings.get("per_round"), settings.get("seed", 0), round_)
        assert sorted(source for sources in found.placed for source in sources) == found.sources == drawn
        weights = sum(SIZES[source] for source in drawn)
        value = sum(SIZES[source] * pulled(value, source, round_) for source in drawn) / weights
        assert run.global_parameters()["weight"].item() == pytest.approx(value, rel=1e-5)
        assert 0 <= found.idle <= 1
    run.close()


def test_an_outer_optimizer_steps_on_the_mean_over_sources():
    run, value = (
        population(2, outer={"method": "diloco", "outer_lr": 0.5, "outer_momentum": 0.0, "nesterov": False}),
        0.5,
    )
    for round_ in range(3):
        run.round()
        mean = sum(size * pulled(value, source, round_) for source, size in enumerate(SIZES)) / sum(SIZES)
        value -= 0.5 * (value - mean)
        assert run.global_parameters()["weight"].item() == pytest.approx(value, rel=1e-5)
    run.close()


def test_rounds_of_other_lengths_and_no_sources_are_refused():
    with pytest.raises(UserError, match="sync_every = 2"):
        population(2, outer={"sync_every": 2})
    with pytest.raises(UserError, match="sizes"):
        Population(SemiSyncConfig(method="local_sgd", sync_every=1), [], [], lambda *_: 1.0)
