"""A loss with weights on torchtitan's chunked loss: equal to it, bit for bit, where it does nothing."""

from dataclasses import dataclass

import pytest
import torch

from tests.losses.steps import batch, head, inner_step, plain_loss, results, with_head
from titan_ext.losses import TokenLoss, Tokens


def token_loss(chunks: int, lm_head: torch.nn.Module, kind: type[TokenLoss] = TokenLoss) -> TokenLoss:
    loss = with_head(kind.Config.build(kind.Config(num_chunks=chunks), compile_config=None), lm_head)
    loss.attach(inner_step(loss))
    return loss


class Halves(TokenLoss):
    """The later half of each sequence counts half."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenLoss.Config):
        pass

    def weights(self, hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        return torch.where(torch.arange(tokens.labels.shape[1]) < tokens.labels.shape[1] // 2, 1.0, 0.5).expand_as(
            tokens.labels
        )


@pytest.mark.parametrize("chunks", [1, 4, 8])
@pytest.mark.parametrize(("rows", "seq_len"), [(2, 32), (3, 512)])
def test_weights_of_one_give_the_plain_losss_bits(chunks: int, rows: int, seq_len: int) -> None:
    tokens, lm_head = batch(rows, seq_len), head()
    states = torch.randn(rows, seq_len, 16)
    expected = results(plain_loss(chunks, lm_head), lm_head, states, tokens.labels)
    for labels in (tokens.pack(), tokens.labels):  # in training, in validation
        for found, wanted in zip(results(token_loss(chunks, lm_head), lm_head, states, labels), expected):
            assert torch.equal(found, wanted)


def test_each_tokens_part_is_multiplied_by_its_weight() -> None:
    tokens, lm_head, states = batch(), head(), torch.randn(2, 32, 16)
    loss = token_loss(4, lm_head, Halves)
    value, *gradients = results(loss, lm_head, states, tokens.pack())
    leaf = states.clone().requires_grad_()
    lm_head.zero_grad()
    each = torch.nn.functional.cross_entropy(
        lm_head(leaf).flatten(0, 1), tokens.labels.flatten(), reduction="none", ignore_index=-100
    )
    expected = (each.view(2, 2, 16) * torch.tensor([1.0, 0.5])[None, :, None]).sum() / 57
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradients, [lm_head.weight.grad, leaf.grad])
    loss.after_step()
    assert loss.report()["cross_entropy"] == pytest.approx(each.sum().item() / 57)


def test_tokens_travel_as_one_tensor() -> None:
    tokens = batch()
    packed = tokens.pack()
    assert packed.shape == (2, 32, 6) and packed.dtype == torch.int64
    again = Tokens.unpack(packed)
    assert all(getattr(again, name).equal(getattr(tokens, name)) for name in Tokens.__slots__)
