"""Sizes of torchtitan's own flavors, written over: one flavor becomes another, and what does not fit is refused."""

from importlib import import_module

import pytest
import torch

from titan_ext.errors import UserError
from titan_ext.models import get_model_spec
from titan_ext.models.sizes import Sizes, sizes_in


def shapes(config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in config.build().state_dict().items()}


def sizes_of(config) -> dict:
    """As ``Sizes`` takes them; tying is none of them."""
    found = {key: value for key, value in sizes_in(config).items() if key != "enable_weight_tying"}
    attention = config.first_attention
    return found | {"head_dim": attention.head_dim or config.dim // attention.n_heads}


@pytest.mark.parametrize(
    "model, flavor, other",
    [
        ("qwen3", "0.6B", "1.7B"),
        ("qwen3", "8B", "32B"),
        ("qwen3", "debugmodel_moe", "30B-A3B"),
        ("qwen3", "debugmodel_non_fused_qkv", "0.6B"),
        ("gpt_oss", "debugmodel", "20b"),
        ("torchtitan.models.llama3", "debugmodel", "8B"),
        ("torchtitan.models.llama3", "8B", "70B"),
    ],
)
def test_a_flavor_with_the_sizes_of_another_is_that_one(model, flavor, other):
    wanted = get_model_spec(model, other).model
    found = get_model_spec(model, flavor, **sizes_of(wanted)).model
    assert sizes_of(found) == sizes_of(wanted)
    ours, theirs = shapes(found), shapes(wanted)
    assert {ours.get(name, shape) for name, shape in theirs.items()} == set(theirs.values())
    assert ours.keys() == theirs.keys()
    assert [layer.attention.rope for layer in found.layers] == [layer.attention.rope for layer in wanted.layers]


def test_latent_attention_takes_width_heads_and_experts():
    config = get_model_spec("deepseek_v3", "debugmodel", dim=64, n_heads=4, expert_dim=32, num_experts=6, top_k=2).model
    found = shapes(config)
    assert found["layers.1.attention.wq.weight"] == (4 * (128 + 64), 64)
    assert found["layers.1.attention.wkv_b.weight"] == (4 * (128 + 128), 512)
    assert found["layers.1.attention.wo.weight"] == (64, 4 * 128)
    assert found["layers.1.moe.router.gate.weight"] == (6, 64)
    assert found["layers.1.moe.routed_experts.inner_experts.w1_EFD"] == (6, 32, 64)
    assert found["layers.1.moe.shared_experts.w1.weight"] == (2 * 32, 64), "two shared experts in one"


def test_layers_beyond_the_flavors_follow_its_pattern():
    windows = [
        each.attention.sliding_window_size for each in get_model_spec("gpt_oss", "debugmodel", n_layers=7).model.layers
    ]
    assert windows == [128, None] * 3 + [128]
    dense = [
        each.feed_forward is not None for each in get_model_spec("deepseek_v3", "debugmodel", n_layers=8).model.layers
    ]
    assert dense == [True] + [False] * 7


def test_more_heads_are_drawn_like_the_flavors():
    """The fused projection's initialiser knows one number of rows; other numbers have the same deviation."""
    config = get_model_spec("qwen3", "debugmodel", dim=64, n_layers=1, n_heads=24, n_kv_heads=3, head_dim=32).model
    torch.manual_seed(0)
    weight = torch.full((30 * 32, 64), torch.nan)
    config.layers[0].attention.qkv_linear.wqkv.param_init["weight"](weight)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05) and weight.mean().abs() < 1e-3


@pytest.mark.parametrize(
    "model, sizes, said",
    [
        ("qwen3", {"dim": 0}, "model.dim = 0: must be above 0"),
        ("qwen3", {"n_heads": 6, "n_kv_heads": 4}, "model.n_kv_heads = 4: 4 key-value heads must divide 6 heads"),
        ("qwen3", {"n_heads": 12}, "model.n_heads = 12: 8 key-value heads must divide 12 heads"),
        ("qwen3", {"head_dim": 7}, "model.head_dim = 7: must be even"),
        ("qwen3", {"num_experts": 4}, "model.num_experts = 4: the flavor has no part of that size"),
        ("gpt_oss", {"ffn_dim": 4}, "model.ffn_dim = 4: the flavor has no part of that size"),
        ("gpt_oss", {"num_experts": 2}, "model.num_experts = 2: a token cannot go to 4 of 2 experts"),
        ("gpt_oss", {"top_k": 9}, "model.top_k = 9: a token cannot go to 9 of 8 experts"),
        ("deepseek_v3", {"head_dim": 64}, "model.head_dim = 64: latent attention has no such size"),
    ],
)
def test_what_does_not_fit_is_refused(model, sizes, said):
    with pytest.raises(UserError) as caught:
        get_model_spec(model, "debugmodel", **sizes)
    assert said in str(caught.value)


def test_without_sizes_a_spec_is_torchtitans():
    ours, theirs = (
        get_model_spec("qwen3", "debugmodel_moe"),
        import_module("torchtitan.models.qwen3").model_registry("debugmodel_moe"),
    )
    assert shapes(ours.model) == shapes(theirs.model)
    assert Sizes() == Sizes(**dict.fromkeys(Sizes.__dataclass_fields__))
