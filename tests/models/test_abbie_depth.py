"""The recurrent-depth baseline against its equations, and its noise."""

import math

import pytest
import torch

from tests.models.abbie_models import batch, build
from titan_ext.models.abbie import flavors, model_registry
from titan_ext.models.abbie.depth import StateNoise


def test_written_out():
    model, inputs = build(variant="depth"), batch()
    positions, mask = inputs["positions"], inputs["attention_masks"]
    blocks = list(model.layers.values())
    e = blocks[0](model.tok_embeddings(inputs["tokens"]), mask, positions)
    s = model.first_state(e, positions)
    for _ in range(3):
        h = torch.cat((s, e), dim=-1) @ model.adapter.weight.T
        for block in blocks[1:3]:
            h = block(h, mask, positions)
        s = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * model.state_norm.weight
    for block in blocks[3:]:
        s = block(s, mask, positions)
    torch.testing.assert_close(model(**inputs, iterations=3), model.lm_head(model.norm(s)), rtol=1e-4, atol=1e-5)


def test_noise_is_a_truncated_normal():
    noise = StateNoise(StateNoise.Config(dim=512))(torch.arange(400)[None]).double() / math.sqrt(2 / (5 * 512))
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    # The deviation of a normal cut at two deviations, and its share within one.
    assert noise.std().item() == pytest.approx(0.8796, abs=0.01)
    assert noise.abs().lt(1).double().mean().item() == pytest.approx(0.6827 / 0.9545, abs=0.005)
    assert 1.99 < noise.abs().max() <= 2
    flat = noise.flatten()
    for lag in (1, 2, 512):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 0.01


def test_noise_depends_on_seed_step_and_position_alone():
    model = build(variant="depth").train()
    start, positions = torch.zeros(2, 6, 32), torch.tensor([[0, 1, 2, 0, 1, 2], [3, 2, 1, 0, 5, 4]])

    def noise(step: int, seed: int = 0) -> torch.Tensor:
        model.config.seed = seed
        model.set_step(step)
        return model.first_state(start, positions)

    first = noise(1)
    assert torch.equal(first, noise(1))
    assert not torch.equal(first, noise(2)) and not torch.equal(first, noise(1, seed=1))
    assert torch.equal(first[0, :3], first[0, 3:]) and torch.equal(first[0, 2], first[1, 1])
    assert torch.equal(model.first_state(start), model.first_state(start, torch.arange(6).expand(2, 6)))
    model.eval()
    assert torch.equal(noise(1), noise(2))


def test_it_is_as_large_as_the_others():
    def parameters(flavor: str) -> int:
        with torch.device("meta"):
            return sum(each.numel() for each in model_registry(flavor).model.build().parameters())

    for name in (flavor for flavor in flavors if "-" not in flavor):
        assert parameters(f"{name}-C") == parameters(f"{name}-standard") == parameters(name)
        assert parameters(f"{name}-depth") == pytest.approx(parameters(name), rel=3e-3)


def test_every_parameter_learns():
    model = build(variant="depth").train()
    model(**batch()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
