"""A loss with weights on torchtitan's chunked loss: equal to it, bit for bit, where it does nothing."""

import math
from dataclasses import dataclass

import pytest
import torch

from tests.losses.steps import batch, head, inner_step, plain_loss, results, with_head
from titan_ext.errors import UserError
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


def reference_with_z(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_loss: float) -> tuple:
    """Loss, plain loss and sum of squared log Z in float64, token by token."""
    loss = plain = squares = torch.zeros((), dtype=torch.float64)
    for row, label, weight in zip(logits.double(), labels.tolist(), weights.double(), strict=True):
        if label == -100:
            continue
        log_z = row.exp().sum().log()
        plain = plain + log_z - row[label]
        squares = squares + log_z**2
        loss = loss + weight * (log_z - row[label] + z_loss * log_z**2)
    return loss, plain, squares


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("kind", [TokenLoss, Halves])
def test_the_z_loss_is_that_of_the_equation_under_any_weights(chunks: int, kind: type[TokenLoss]) -> None:
    tokens, lm_head, states = batch(), head(), torch.randn(2, 32, 16)
    loss = with_head(kind.Config(num_chunks=chunks, z_loss=0.3).build(compile_config=None), lm_head)
    loss.attach(inner_step(loss))
    value, *gradients = results(loss, lm_head, states, tokens.pack())
    leaf, weight = states.double().requires_grad_(), lm_head.weight.detach().double().requires_grad_()
    weights = loss.weights(states, tokens).flatten()
    wanted, plain, squares = reference_with_z((leaf @ weight.T).flatten(0, 1), tokens.labels.flatten(), weights, 0.3)
    (wanted / 57).backward()
    torch.testing.assert_close(value.double(), wanted.detach() / 57, rtol=1e-5, atol=1e-6)
    for found, each in zip(gradients, (weight.grad, leaf.grad), strict=True):
        torch.testing.assert_close(found.double(), each, rtol=1e-4, atol=1e-6)
    loss.after_step()
    assert loss.report() == pytest.approx(
        {"cross_entropy": plain.item() / 57, "z_loss": 0.3 * squares.item() / 57}, rel=1e-5
    )


def test_validation_has_no_z_loss() -> None:
    tokens, lm_head, states = batch(), head(), torch.randn(2, 32, 16)
    loss = with_head(TokenLoss.Config(num_chunks=4, z_loss=0.3).build(compile_config=None), lm_head)
    loss.attach(inner_step(loss))
    expected = results(plain_loss(4, lm_head), lm_head, states, tokens.labels)
    assert all(map(torch.equal, results(loss, lm_head, states, tokens.labels), expected))


def test_the_loss_is_also_measured_against_the_frequencies_of_the_sites_tokens() -> None:
    tokens, lm_head = batch(), head()
    loss = with_head(TokenLoss.Config(num_chunks=4, unigram_documents=2).build(compile_config=None), lm_head)
    texts = ("aab", "b", "never read")
    loss.attach(inner_step(loss, documents=texts))
    loss(torch.randn(2, 32, 16), tokens.pack(), torch.tensor(59))
    loss.after_step()
    found = loss.report()
    tokenizer = loss._step.tokenizer
    counts = [1] * tokenizer.get_vocab_size()
    for text in texts[:2]:
        for token in tokenizer.encode(text, add_bos=True, add_eos=True):
            counts[token] += 1
    learnt = [label for label in tokens.labels.flatten().tolist() if label != -100]
    wanted = -sum(math.log(counts[label] / sum(counts)) for label in learnt) / 59
    assert found["unigram_ce"] == pytest.approx(wanted)
    assert found["normalised_loss"] == pytest.approx(found["cross_entropy"] - wanted)
    assert "z_loss" not in found


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("kind", [TokenLoss, Halves])
def test_each_sources_loss_is_that_of_its_own_tokens_and_changes_no_bit(chunks: int, kind: type[TokenLoss]) -> None:
    """Two passes of a step, their documents of two files mixed in each sequence; of a third file there is nothing."""
    lm_head, passes = head(), [(batch(seed=seed), torch.randn(2, 32, 16)) for seed in (1, 2)]
    loss = with_head(kind.Config.build(kind.Config(num_chunks=chunks, by_source=True), compile_config=None), lm_head)
    loss.attach(inner_step(loss, sources=("a", "b", "c"), sum_over_site=lambda counted: 2 * counted))
    expected: dict[int, list[float]] = {0: [], 1: []}
    for tokens, states in passes:
        found = results(loss, lm_head, states, tokens.pack())
        for mine, plain in zip(found, results(token_loss(chunks, lm_head, kind), lm_head, states, tokens.pack())):
            assert torch.equal(mine, plain)
        logits = lm_head(states).log_softmax(-1)
        for row, place in (tokens.labels != -100).nonzero().tolist():
            expected[int(tokens.source[row, place])].append(-logits[row, place, tokens.labels[row, place]].item())
    loss.after_step()
    report = loss.report()
    assert {name for name in report if "/" in name} == {"cross_entropy/a", "cross_entropy/b"}
    for number, name in enumerate("ab"):
        assert report[f"cross_entropy/{name}"] == pytest.approx(sum(expected[number]) / len(expected[number]), rel=1e-5)
    loss.after_step()
    assert not any("/" in name for name in loss.report()), "the next step counts anew"


def test_files_of_one_corpus_of_a_mix_count_together_and_too_many_are_refused() -> None:
    loss = TokenLoss.Config(num_chunks=1, by_source=True).build(compile_config=None)
    with pytest.raises(UserError, match="loss.by_source.*65 files.*at most 64.*data.mix"):
        loss.attach(inner_step(loss, sources=tuple(map(str, range(65)))))
    loss = with_head(loss, head())
    loss.attach(inner_step(loss, sources=tuple(map(str, range(65))), corpora=("wiki",) * 64 + ("code",)))
    loss(torch.randn(2, 32, 16), batch().pack(), torch.tensor(59))
    loss.after_step()
    assert {name for name in loss.report() if "/" in name} == {"cross_entropy/wiki"}
