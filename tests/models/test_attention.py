"""Attention over packed documents against a mask and a softmax written out in loops."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from torchtitan.models.common.attention import (
    get_causal_mask_mod,
    get_document_mask_mod,
    get_efficient_causal_mask_mod_for_packed_document,
)
from torchtitan.models.gpt_oss.model import apply_attention_sink_rescale

from titan_ext.models import get_model_spec
from titan_ext.models.attention import PackedAttention, document_causal_mask, use_packed_attention

LENGTHS = [[5, 1, 6], [12], [1] * 12, [3, 9], [11, 1]]


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[p for length in row for p in range(length)] for row in lengths])


def written_out(q, k, v, lengths, scale) -> torch.Tensor:
    """float64, one query at a time: the softmax over the keys of its document up to itself."""
    B, L, N, _ = q.shape
    group = N // k.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(B):
        start = 0
        for length in lengths[b]:
            for i in range(start, start + length):
                for n in range(N):
                    scores = [
                        scale * float((q[b, i, n].double() * k[b, j, n // group].double()).sum())
                        for j in range(start, i + 1)
                    ]
                    total = sum(math.exp(score) for score in scores)
                    for j, score in zip(range(start, i + 1), scores):
                        out[b, i, n] += math.exp(score) / total * v[b, j, n // group].double()
            start += length
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_the_written_out_mask(kv_heads):
    torch.manual_seed(0)
    B, L, N, H = len(LENGTHS), 12, 4, 8
    q, k, v = torch.randn(B, L, N, H), torch.randn(B, L, kv_heads, H), torch.randn(B, L, kv_heads, H)
    mask = document_causal_mask(positions_of(LENGTHS))
    attention = PackedAttention(PackedAttention.Config())
    got = attention(q, k, v, attention_masks=mask, scale=H**-0.5, enable_gqa=kv_heads != N)
    torch.testing.assert_close(got.double(), written_out(q, k, v, LENGTHS, H**-0.5), rtol=0, atol=1e-5)


def test_mask_equals_torchtitans_flex_masks():
    positions = positions_of(LENGTHS)
    B, L = positions.shape
    causal = get_causal_mask_mod()
    for document in (get_document_mask_mod(positions), get_efficient_causal_mask_mod_for_packed_document(positions)):
        want = create_mask(causal, B, 1, L, L, "cpu") & create_mask(document, B, 1, L, L, "cpu")
        assert torch.equal(document_causal_mask(positions), want)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_sink_takes_its_share_of_the_softmax(kv_heads):
    """gpt_oss's learned sink is one more score of each head; its gradient flows back through the denominator."""
    torch.manual_seed(2)
    B, L, N, H = len(LENGTHS), 12, 4, 8
    q, k, v = (torch.randn(B, L, heads, H, requires_grad=True) for heads in (N, kv_heads, kv_heads))
    sinks = torch.randn(N, requires_grad=True)
    mask = document_causal_mask(positions_of(LENGTHS))

    def wanted():
        keys, values = (each.repeat_interleave(N // kv_heads, dim=2).transpose(1, 2) for each in (k, v))
        scores = (q.transpose(1, 2) @ keys.transpose(-2, -1) * H**-0.5).masked_fill(~mask, -torch.inf)
        scores = torch.cat([scores, sinks[None, :, None, None].expand(B, N, L, 1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ values).transpose(1, 2)

    def found():
        sunk = lambda out, lse: apply_attention_sink_rescale(out, lse, sinks)
        attention = PackedAttention(PackedAttention.Config())
        return attention(q, k, v, attention_masks=mask, scale=H**-0.5, enable_gqa=kv_heads != N, out_transform=sunk)

    torch.testing.assert_close(found(), wanted(), rtol=0, atol=1e-5)
    weights = torch.randn(B, L, N, H)
    gradients = [torch.autograd.grad((each() * weights).sum(), (q, k, v, sinks)) for each in (found, wanted)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_window_ends_where_torchtitans_does():
    """gpt_oss's masks, by name, for rows of one document, of several, and of the rest of one."""
    model = use_packed_attention(
        get_model_spec("gpt_oss", "debugmodel", dim=32, n_layers=2, n_heads=2, n_kv_heads=1).model
    )
    with torch.device("meta"):
        model = model.build()
    positions = torch.stack([torch.arange(200), torch.arange(200) % 150, torch.arange(200) + 5])
    masks = model.get_attention_masks(positions)
    positions = positions.clone()
    positions[:, 0] = 0
    full = document_causal_mask(positions)
    near = torch.arange(200)[:, None] - torch.arange(200) < 128
    assert torch.equal(masks["basic_mask"], full) and torch.equal(masks["sliding_window_mask"], full & near)


@pytest.mark.parametrize(
    "model, flavor, said",
    [
        ("muse_glimmer", "debugmodel", "MuseGlimmerModel makes attention masks of its own"),
        ("kimi_k2_7", "debugmodel", "KimiK25Model has a vision encoder"),
        ("flux", "flux-debug", "FluxModel is no decoder of text"),
    ],
)
def test_what_only_an_accelerator_can_is_refused(model, flavor, said):
    with pytest.raises(ValueError, match=said):
        use_packed_attention(get_model_spec(model, flavor).model)


def test_no_gradient_crosses_a_document_boundary():
    torch.manual_seed(1)
    positions = positions_of([[5, 7]])
    q, k, v = (torch.randn(1, 12, 2, 4, requires_grad=True) for _ in range(3))
    out = PackedAttention(PackedAttention.Config())(q, k, v, attention_masks=document_causal_mask(positions))
    out[:, 5:].square().sum().backward()
    assert k.grad[:, :5].abs().max() == 0 and v.grad[:, :5].abs().max() == 0
    assert k.grad[:, 5:].abs().max() > 0


def test_a_sequence_that_continues_a_document_sees_its_own_start():
    """A row may begin in the middle of a document: its first position is then not 0."""
    mask = document_causal_mask(torch.tensor([[3, 4, 5, 0, 1]]))[0, 0]
    assert mask.tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [False, False, False, True, False],
        [False, False, False, True, True],
    ]
