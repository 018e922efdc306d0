"""Experts shared out over sites: which site holds which, what is skipped, and how they begin."""

import pytest
import torch
import torch.nn.functional as F

from titan_ext.errors import UserError
from titan_ext.models import get_model_spec
from titan_ext.models.attention import use_packed_attention
from titan_ext.models.experts import use_wide_experts
from titan_ext.models.held_experts import held_experts, hold

SIZES = {"dim": 32, "n_layers": 2, "n_heads": 2, "num_experts": 6, "top_k": 2, "expert_dim": 8, "vocab_size": 64}
FLAVORS = {"qwen3": "debugmodel_moe", "deepseek_v3": "debugmodel", "gpt_oss": "debugmodel"}
HEADS = {"n_kv_heads": 2, "head_dim": 16}


def model_of(name: str, copies: int | None = None, site: int = 0, sites: int = 3) -> torch.nn.Module:
    spec = get_model_spec(name, FLAVORS[name], **SIZES, **(HEADS if name != "deepseek_v3" else {}))
    if copies is not None:
        spec = hold(spec, copies, site, sites)
    use_wide_experts(spec.model)
    model = use_packed_attention(spec.model).build()
    torch.manual_seed(3)
    with torch.no_grad():
        model.init_weights()
    return model


@pytest.mark.parametrize("total, copies, sites", [(6, 1, 3), (6, 2, 3), (6, 3, 3), (8, 2, 4), (4, 3, 4), (2, 1, 2)])
def test_every_expert_is_at_as_many_sites_and_every_site_holds_as_many(total, copies, sites):
    held = [held_experts(total, copies, site, sites) for site in range(sites)]
    assert {len(each) for each in held} == {total * copies // sites}
    assert all(sum(expert in each for each in held) == copies for expert in range(total))
    assert all(expert in held[expert % sites] for expert in range(total)), "the owner of a row is one of its holders"


@pytest.mark.parametrize("name", FLAVORS)
@pytest.mark.parametrize("copies", [1, 2])
def test_what_is_shared_begins_alike_at_all_sites(name, copies):
    whole = dict(model_of(name).named_parameters())
    for site in range(3):
        held = list(held_experts(6, copies, site, 3))
        for key, parameter in model_of(name, copies, site).named_parameters():
            wanted = whole[key][held] if "inner_experts" in key else whole[key]
            assert torch.equal(parameter, wanted), key


@pytest.mark.parametrize("copies, site", [(1, 0), (1, 2), (2, 1)])
def test_choices_of_other_experts_are_skipped(copies, site):
    """Against a loop over tokens: the weights are the router's, and what is not here adds nothing and learns nothing."""
    moe = model_of("qwen3", copies, site).layers["0"].moe
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
    x_BLD = torch.randn(2, 20, 32, requires_grad=True)
    out_BLD = moe(x_BLD)
    held = held_experts(6, copies, site, 3)
    experts = moe.routed_experts.inner_experts
    scores = F.softmax(x_BLD.detach() @ moe.router.gate.weight.T, dim=-1)
    top, ids = scores.topk(2, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    skipped, wanted = 0, torch.zeros_like(out_BLD)
    for b, t, k in torch.cartesian_prod(torch.arange(2), torch.arange(20), torch.arange(2)).tolist():
        if int(ids[b, t, k]) not in held:
            skipped += 1
            continue
        row, x = held.index(int(ids[b, t, k])), x_BLD[b, t].detach().bfloat16()
        hidden = F.silu(experts.w1_EFD[row].bfloat16() @ x) * (experts.w3_EFD[row].bfloat16() @ x)
        wanted[b, t] += top[b, t, k] * (experts.w2_EDF[row].bfloat16() @ hidden).float()
    assert 0 < skipped < 80
    torch.testing.assert_close(out_BLD, wanted, rtol=0.05, atol=0.5)
    assert moe.tokens_per_expert_E.sum() == 80, "the router's counts are of all experts"
    out_BLD.square().sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in moe.parameters())
    assert moe.router.gate.weight.grad.any() and experts.w1_EFD.grad.any()


def test_a_batch_whose_choices_are_all_elsewhere_adds_nothing():
    moe = model_of("qwen3", 1, 0).layers["0"].moe  # holds experts 0 and 3
    with torch.no_grad():
        moe.expert_bias_E.copy_(torch.tensor([-9.0, 9, 9, -9, -9, -9]))
    x_BLD = torch.randn(1, 8, 32, requires_grad=True)
    out_BLD = moe(x_BLD)
    out_BLD.sum().backward()
    assert not out_BLD.any() and torch.isfinite(x_BLD.grad).all()


@pytest.mark.parametrize(
    "model, flavor, copies, sites, said",
    [
        ("qwen3", "debugmodel", 1, 2, "must be 0: the model has no experts"),
        ("gpt_oss", "debugmodel", 1, 3, "8 experts x 1 cannot be shared out evenly over 3 sites"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(model, flavor, copies, sites, said):
    with pytest.raises(UserError) as caught:
        hold(get_model_spec(model, flavor), copies, 0, sites)
    assert said in str(caught.value) and "fomoe.sites_per_expert" in str(caught.value)
