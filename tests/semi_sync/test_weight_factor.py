"""A training loop may multiply its site's weight."""

import pytest
import torch

from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites


@pytest.mark.parametrize("weighting", ["uniform", "tokens", "site"])
def test_a_sites_weight_is_multiplied(weighting: str) -> None:
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    for model in models:
        model.weight.data.fill_(0.0)
    sites = InProcessSites(2)
    config = SemiSyncConfig(method="local_sgd", sync_every=1, weighting=weighting)
    outer = sites.outer_loops(config, models, options=[{"weight": 2.0}, {"weight": 1.0}])
    for model, value in zip(models, (1.0, 5.0)):
        model.weight.data.fill_(value)
    outer[1].weight_factor = 0.25
    sites.at_once(lambda site: outer[site].step(tokens=(2, 1)[site]))
    sites.close()
    weights = (1.0 if weighting == "uniform" else 2.0, 0.25)
    expected = (weights[0] * 1.0 + weights[1] * 5.0) / sum(weights)
    assert [model.weight.item() for model in models] == pytest.approx([expected] * 2)
