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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_changes_nothing_and_what_is_rounded_is_said(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Sites without tokens keep what they have, in rounds without effect; sites exchange float32."""
    models = [torch.nn.Linear(1, 1, bias=False, dtype=dtype) for _ in range(2)]
    sites = InProcessSites(2)
    outer = sites.outer_loops(SemiSyncConfig(method="local_sgd", sync_every=1, weighting="tokens"), models)
    for model, value in zip(models, (1.0, 5.0)):
        model.weight.data.fill_(value)
    for _ in range(2):
        sites.at_once(lambda site: outer[site].step(tokens=0))
    sites.close()
    assert [model.weight.item() for model in models] == [1.0, 5.0]
    said = [record.getMessage() for record in caplog.records]
    assert sum("no site has any weight" in each for each in said) == 2, "once at each site"
    assert any("rounded to float32" in each for each in said) == (dtype == torch.float64)
