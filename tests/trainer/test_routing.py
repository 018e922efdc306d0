"""Statistics of routers against a count written out."""

import math
from types import SimpleNamespace

import pytest
import torch

from titan_ext.models import get_model_spec
from titan_ext.models.attention import use_packed_attention
from titan_ext.trainer.routing import RoutingStatistics, balance

ALONE = SimpleNamespace(ep_enabled=False, tp=1, pp_enabled=False, get_optional_mesh=lambda name: None)


@pytest.mark.parametrize("tokens", [[4, 4, 4, 4], [16, 0, 0, 0], [1, 2, 3, 10], [0, 5, 5, 6], [7]])
def test_balance_of_a_layer(tokens):
    total, found = sum(tokens), balance(torch.tensor(tokens, dtype=torch.float32))
    entropy = -sum(each / total * math.log(each / total) for each in tokens if each)
    assert found["max_load"] == pytest.approx(max(tokens) * len(tokens) / total)
    assert found["min_load"] == pytest.approx(min(tokens) * len(tokens) / total)
    assert found["idle_experts"] == tokens.count(0)
    assert found["entropy"] == pytest.approx(entropy / math.log(len(tokens)) if len(tokens) > 1 else 1)


def test_a_layer_without_tokens_has_numbers():
    assert balance(torch.zeros(3)) == {"max_load": 0.0, "min_load": 0.0, "entropy": 0.0, "idle_experts": 3.0}


@pytest.mark.parametrize("coefficient", [0.01, 0.0], ids=["balanced", "not balanced"])
def test_counts_are_those_of_the_step_and_balancing_stays_torchtitans(coefficient):
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16}
    experts = {"num_experts": 4, "top_k": 1, "expert_dim": 8, "load_balance_coeff": coefficient, "vocab_size": 64}
    spec = get_model_spec("qwen3", "debugmodel_moe", **sizes, **experts)
    model = use_packed_attention(spec.model).build()
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    statistics = RoutingStatistics(lambda: True)
    statistics.observing(spec.post_optimizer_build_fn)(optimizer, [model], ALONE)
    for step in range(2):
        routed = []

        def note(router, inputs, outputs):
            routed.append(outputs[1])

        hooks = [layer.moe.router.register_forward_hook(note) for layer in model.layers.values()]
        positions = torch.arange(24).expand(2, 24)
        tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(step))
        bias = [layer.moe.expert_bias_E.clone() if coefficient else None for layer in model.layers.values()]
        model(tokens, positions, model.get_attention_masks(positions)).sum().backward()
        optimizer.step()
        counts = [torch.bincount(each.flatten(), minlength=4).float() for each in routed]
        found = statistics.metrics()
        assert found["routing/max_load"] == pytest.approx(max(4 * count.max().item() / 48 for count in counts))
        assert found["routing/entropy"] == pytest.approx(sum(balance(count)["entropy"] for count in counts) / 2)
        assert all(not layer.moe.tokens_per_expert_E.any() for layer in model.layers.values())
        for layer, count, before in zip(model.layers.values(), counts, bias):
            if coefficient:
                step_E = coefficient * torch.sign(count.mean() - count)
                torch.testing.assert_close(layer.moe.expert_bias_E, before + step_E - step_E.mean())
        for hook in hooks:
            hook.remove()
