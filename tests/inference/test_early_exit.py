"""Early exit: against a fixed count, and against the same keys computed without a cache."""

import pytest
import torch

from tests.inference.decoding_models import CASES, lively, sequence
from titan_ext.inference import decoding
from titan_ext.inference.decoding import Cached, EarlyExit, relative_change
from titan_ext.models.abbie.model import PerBlock

LENGTH = 16
ITERATING = [case for case, (_, iterations) in CASES.items() if iterations in (2, 4)]


def steps(each: Cached, tokens: list[int], read: int) -> torch.Tensor:
    each.read(tokens[:read])
    return torch.stack([each.step(token) for token in tokens[read:]])


@pytest.mark.parametrize("case", ITERATING)
@pytest.mark.parametrize("read", [0, 6])
def test_without_tolerance_every_token_takes_all_iterations(case, read):
    overrides, most = CASES[case]
    model, tokens = lively(**overrides), sequence(LENGTH)
    early = EarlyExit(model, 0.0, most, LENGTH)
    logits = steps(early, tokens, read)
    assert early.iterations_run == (LENGTH - read) * [most]
    assert torch.equal(logits, steps(Cached(model, most, LENGTH), tokens, read))


@pytest.mark.parametrize("case", ITERATING)
def test_a_huge_tolerance_is_one_iteration(case):
    overrides, most = CASES[case]
    model, tokens = lively(**overrides), sequence(LENGTH)
    early = EarlyExit(model, 1e9, most, LENGTH)
    logits = steps(early, tokens, 0)
    assert early.iterations_run == LENGTH * [1]
    torch.testing.assert_close(logits, steps(Cached(model, 1, LENGTH), tokens, 0), rtol=1e-4, atol=1e-5)


def test_a_smaller_tolerance_takes_more_iterations():
    model, tokens = lively(), sequence(LENGTH)
    means = []
    for tolerance in (1.0, 0.3, 0.1, 0.03, 0.01):
        early = EarlyExit(model, tolerance, 12, LENGTH)
        steps(early, tokens, 1)
        means.append(sum(early.iterations_run) / len(early.iterations_run))
    assert means == sorted(means) and 1 <= means[0] < means[-1] <= 12


class Frozen(torch.nn.Module, PerBlock):
    """Attention of all tokens at once in which each token keeps the keys and values of its last iteration."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.counts = torch.tensor(counts)
        self.kept = {}
        self.place = (0, 0)

    def at(self, iteration, layer):
        self.place = iteration, layer
        return None

    def forward(self, q, k, v, *, attention_masks, scale, enable_gqa):
        iteration, layer = self.place
        if iteration:
            over = (self.counts <= iteration)[None, :, None, None]
            k, v = (torch.where(over, *each) for each in zip(self.kept[iteration - 1, layer], (k, v)))
        self.kept[self.place] = k, v
        heads = (each.transpose(1, 2) for each in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)


@torch.no_grad()
def frozen_logits(model, tokens: list[int], counts: list[int]) -> torch.Tensor:
    """Logits of all tokens at once, token t with ``counts[t]`` iterations."""
    frozen = Frozen(counts)
    for block in model.layers.values():
        block.attention.inner_attention = frozen
    inputs, positions = torch.tensor([tokens]), torch.arange(len(tokens))[None]
    start = model.head_forward(inputs, positions, frozen)
    state, end = model.first_state(start, positions), torch.empty_like(start)
    for iteration in range(max(counts)):
        output = model.body_forward(state, start, positions, frozen, iteration=iteration)
        now = frozen.counts == iteration + 1
        end[:, now] = model.next_state(output, state, start, last=True)[:, now]
        state = model.next_state(output, state, start, last=False)
    return model.tail_forward(end, positions, frozen)[0]


@pytest.mark.parametrize("case", ["D-4", "D-input-4", "C-4", "depth-4"])
def test_later_tokens_see_the_last_keys_of_tokens_that_stopped(case, monkeypatch):
    overrides, most = CASES[case]
    tokens = sequence(LENGTH)
    counts = 3 * [most] + [1, 3, 2, 4, 1, 1, 4, 2, 3, 1, 4, 2, 4]
    # What relative_change is to say after each iteration that may be the last.
    said = iter([0.0 if done == count else 1.0 for count in counts[3:] for done in range(1, min(count, most - 1) + 1)])
    monkeypatch.setattr(decoding, "relative_change", lambda before, after: next(said))
    early = EarlyExit(lively(**overrides), 0.5, most, LENGTH)
    logits = steps(early, tokens, 3)
    assert early.iterations_run == counts[3:] and next(said, None) is None
    expected = frozen_logits(lively(**overrides), tokens, counts)
    torch.testing.assert_close(logits, expected[3:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, steps(Cached(lively(**overrides), most, LENGTH), tokens, 3), atol=1e-2)


def test_the_change_of_a_state_is_that_of_its_direction():
    state = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    assert relative_change(state, 2 * state) == pytest.approx(0, abs=1e-6)
    assert relative_change(state, -state) == pytest.approx(2)
    east, north = torch.eye(8)[:2, None, None]
    assert relative_change(east, 3 * north) == pytest.approx(2**0.5)
