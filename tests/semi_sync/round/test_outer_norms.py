"""Norms, cosine and noise scale of rounds, against what the equations give in float64."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.round.outer_norms import layer_of, mean_cosine, noise_and_signal
from titan_ext.semi_sync.testing import InProcessSites

SITES, ROUNDS = 3, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(3, 4)
        self.layers = nn.ModuleDict({"0": nn.Linear(4, 2), "1": nn.Linear(2, 2, bias=False)})

    def flat(self, layer: str = "") -> torch.Tensor:
        named = [(name, each) for name, each in self.named_parameters() if name.startswith(layer)]
        return torch.cat([each.detach().double().flatten() for _, each in named])


def train(config: SemiSyncConfig, weights: list[float], every: int = 1) -> list[dict[str, Any]]:
    """The first site's record of each round, with what each site's update was (``updates``) and the model after it."""
    torch.manual_seed(0)
    models = [Model() for _ in range(SITES)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    sites = InProcessSites(SITES)
    options = [{"name": f"site{each}", "weight": weights[each], "norms_every": every} for each in range(SITES)]
    outer = sites.outer_loops(config, models, options=options)
    records = []
    for _ in range(ROUNDS):
        before = models[0].flat()
        for model in models:
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter) + 0.05
        updates = torch.stack([before - model.flat() for model in models])
        sites.at_once(lambda site: outer[site].step())
        record = outer[0].ledger.last.as_dict()
        records.append(record | {"updates": updates, "model": models[0].flat(), "layer": models[0].flat("layers.0")})
    sites.close()
    return records


CONFIGS = {
    "outer step": dict(method="diloco", sync_every=1, outer_lr=0.5, outer_momentum=0.9),
    "mean of values": dict(method="local_sgd", sync_every=1),
    "fragments": dict(method="diloco", sync_every=2, num_fragments=2),
}


@pytest.mark.parametrize("name", ["outer step", "mean of values"])
def test_norms_and_agreement_are_those_of_the_equations(name: str) -> None:
    weights = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    buffer, noise, signal = 0.0, 0.0, 0.0
    for record in train(SemiSyncConfig(**CONFIGS[name]), weights.tolist()):
        updates = record["updates"]
        mean = updates.mean(0)
        norms = record["norms"]
        assert norms["pseudo_gradient"] == pytest.approx(mean.norm().item(), rel=1e-4)
        assert norms["model"] == pytest.approx(record["model"].norm().item(), rel=1e-5)
        assert record["norms_by_layer"]["model"]["layers.0"] == pytest.approx(record["layer"].norm().item(), rel=1e-5)
        for what, layers in record["norms_by_layer"].items():
            assert set(layers) == {"tok_embeddings", "layers.0", "layers.1"}
            assert math.sqrt(sum(each**2 for each in layers.values())) == pytest.approx(norms[what], rel=1e-6)
        if name == "outer step":
            buffer = 0.9 * buffer + mean
            assert norms["momentum_buffer"] == pytest.approx(buffer.norm().item(), rel=1e-4)
        products, lengths = updates @ updates.T, updates.norm(dim=1)
        others = ~torch.eye(SITES, dtype=torch.bool)
        cosine = products[others].sum() / torch.outer(lengths, lengths)[others].sum()
        assert record["cosine"] == pytest.approx(cosine.item(), abs=1e-4)
        small, big = updates.pow(2).sum(1).mean(), mean.pow(2).sum()
        noise = 0.99 * noise + 0.01 * (small - big) / (1 - 1 / SITES)
        signal = 0.99 * signal + 0.01 * (SITES * big - small) / (SITES - 1)
        assert record["noise_scale"] == pytest.approx((noise / signal).item(), rel=1e-3)


def test_weights_count_in_the_cosine_and_leave_the_noise_unknown() -> None:
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    config = SemiSyncConfig(method="diloco", sync_every=1, weighting="site")
    for record in train(config, weights.tolist()):
        scaled = weights[:, None] * record["updates"]
        products, lengths = scaled @ scaled.T, scaled.norm(dim=1)
        others = ~torch.eye(SITES, dtype=torch.bool)
        cosine = products[others].sum() / torch.outer(lengths, lengths)[others].sum()
        assert record["cosine"] == pytest.approx(cosine.item(), abs=1e-4)
        assert record["noise_scale"] is None


def test_fragments_are_measured_in_turn_and_steps_between_measurements_are_kept() -> None:
    records = train(SemiSyncConfig(**CONFIGS["fragments"]), [1.0] * SITES)
    assert [len(record["norms_by_layer"]["model"]) < 3 for record in records] == [True] * ROUNDS
    every_third = train(SemiSyncConfig(**CONFIGS["outer step"]), [1.0] * SITES, every=3)
    assert [record["norms"] is not None for record in every_third] == [True, False, False, True]
    never = train(SemiSyncConfig(**CONFIGS["outer step"]), [1.0] * SITES, every=0)
    assert all(record["norms"] is record["cosine"] is None for record in never)


def test_inner_steps_stand_still_for_a_round_without_delay() -> None:
    for record in train(SemiSyncConfig(**CONFIGS["outer step"]), [1.0] * SITES):
        parts = [record[f"seconds_{part}"] for part in ("quorum", "reduce", "apply")]
        assert record["seconds_stalled"] == pytest.approx(sum(parts)) and record["seconds_hidden"] == 0.0
        assert record["missing"] == {}


def test_the_noise_scale_of_synthetic_updates() -> None:
    """It finds the trace of a known covariance and the square of a known mean."""
    generator = torch.Generator().manual_seed(1)
    mean, sites, found = torch.full((500,), 0.1, dtype=torch.float64), 4, []
    for _ in range(2000):
        updates = mean + 0.5 * torch.randn(sites, 500, generator=generator, dtype=torch.float64)
        squares = updates.pow(2).sum(1).tolist()
        found.append(noise_and_signal(squares, updates.mean(0).pow(2).sum().item()))
    noise, signal = (sum(each) / len(found) for each in zip(*found))
    assert noise == pytest.approx(500 * 0.25, rel=0.01) and signal == pytest.approx(500 * 0.01, rel=0.05)


def test_cosine_of_two() -> None:
    assert mean_cosine([1, 1], [4.0, 9.0], (5 / 2) ** 2) == pytest.approx(1.0)
    assert mean_cosine([1, 1], [4.0, 4.0], 0.0) == pytest.approx(-1.0)
    assert mean_cosine([1, 1], [0.0, 4.0], 1.0) is None


@pytest.mark.parametrize(
    "name, layer",
    [
        ("layers.11.attention.wq.weight", "layers.11"),
        ("model.layers.0.norm.weight", "layers.0"),
        ("tok_embeddings.weight", "tok_embeddings"),
        ("norm.weight", "norm"),
    ],
)
def test_layers_by_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer
