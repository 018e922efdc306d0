"""A general model and one for each modality beside it, which teach each other (arXiv 2305.12134): trunk and general head are
everybody's, the group head that of the sites of one modality. The loss is the training loop's; the plan is one scope."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from titan_ext.semi_sync import ScopeConfig, SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites

MODALITIES = ["accelerometer", "gyroscope", "accelerometer", "gyroscope"]
FEATURES, HIDDEN, CLASSES, STEPS = 6, 16, 4, 60
OF_MODALITY = ScopeConfig(name="group_head", parameters=["group.*"], shared="group", group="modality")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
        self.general, self.group = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, CLASSES)

    def forward(self, inputs):
        hidden = self.trunk(inputs)
        return self.general(hidden), self.group(hidden)


def data_of(modality, seed, count=32):
    """Four classes by the signs of two features, of which a gyroscope has the names the other way round."""
    inputs = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    classes = 2 * (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    return inputs, classes if modality == "accelerometer" else CLASSES - 1 - classes


def mutual(one, other):
    """What each of two predictions learns of the other, which stands still meanwhile."""
    return sum(
        F.kl_div(F.log_softmax(own, -1), F.softmax(theirs.detach(), -1), reduction="batchmean")
        for own, theirs in ((one, other), (other, one))
    )


def trained(modalities, distillation, scopes):
    models, sites = [Model() for _ in modalities], InProcessSites(len(modalities))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    options = [{"name": f"site{i}", "labels": {"modality": each}} for i, each in enumerate(modalities)]
    config = SemiSyncConfig(method="local_sgd", sync_every=4, scopes=scopes)
    outer = sites.outer_loops(config, models, optimizers, options)
    for step in range(STEPS):
        for site, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            inputs, classes = data_of(modalities[site], 100 * step + site)
            general, group = model(inputs)
            loss = F.cross_entropy(general, classes) + F.cross_entropy(group, classes)
            (loss + distillation * mutual(general, group)).backward()
            optimizer.step()
            optimizer.zero_grad()
        sites.at_once(lambda site: outer[site].step())
    sites.close()
    return models


@pytest.mark.parametrize("distillation", [0.0, 0.1])
def test_models_of_a_modality_beat_the_general_one(distillation):
    models = trained(MODALITIES, distillation, [OF_MODALITY])
    for modality, model in zip(MODALITIES, models, strict=True):
        inputs, classes = data_of(modality, seed=7, count=512)
        general, group = (F.cross_entropy(each, classes).item() for each in model(inputs))
        assert group < 0.8 < general
    assert torch.equal(models[0].general.weight, models[1].general.weight)
    assert torch.equal(models[0].group.weight, models[2].group.weight)
    assert not torch.equal(models[0].group.weight, models[1].group.weight)


def test_with_one_modality_it_is_fedavg_of_both_models():
    alike = [MODALITIES[0]] * 3
    scoped, plain = trained(alike, 0.1, [OF_MODALITY]), trained(alike, 0.1, [])
    for one, other in zip(scoped, plain, strict=True):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
