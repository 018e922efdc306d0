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

from titan_ext.models.attention import PackedAttention, document_causal_mask

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
