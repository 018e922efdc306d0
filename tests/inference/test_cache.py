"""Decoding with the key-value cache against computing the whole sequence again."""

import pytest
import torch

from tests.inference.decoding_models import CASES, lively, sequence
from tests.models.abbie_models import VOCABULARY
from titan_ext.errors import UserError
from titan_ext.inference import decoding
from titan_ext.inference.cache import KeyValueCache, use_cache
from titan_ext.inference.decoding import Cached, Uncached, generate
from titan_ext.inference.model import logits_of
from titan_ext.inference.sampling import Sampler

LENGTH = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def whole(model, tokens: list[int], iterations: int | None) -> torch.Tensor:
    """Logits ``[L, V]`` of all tokens at once."""
    with torch.no_grad():
        return logits_of(model, torch.tensor([tokens]), torch.arange(len(tokens))[None], iterations=iterations)[0]


def stepwise(model, tokens: list[int], iterations: int | None, read: int) -> torch.Tensor:
    """Logits of the tokens after the first ``read``, from the cache."""
    sequence = Cached(model, iterations, len(tokens))
    sequence.read(tokens[:read])
    return torch.stack([sequence.step(token) for token in tokens[read:]])


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_whole_sequence(case, monkeypatch):
    overrides, iterations = CASES[case]
    model, tokens = lively(**overrides), sequence(LENGTH)
    expected = whole(model, tokens, iterations)
    # A prompt of none, of one piece, and of several that do not divide it.
    monkeypatch.setattr(decoding, "_TOGETHER", 5)
    for read in (0, 4, 12):
        torch.testing.assert_close(stepwise(model, tokens, iterations, read), expected[read:], **CLOSE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_decoding_without_a_cache(case, temperature):
    overrides, iterations = CASES[case]
    model, prompt = lively(**overrides), sequence(5, seed=1)
    texts = []
    for each in (Uncached(model, iterations), Cached(model, iterations, 17)):
        texts.append(list(generate(each, prompt, Sampler(VOCABULARY, temperature), 12)))
        assert each.iterations_run == 12 * [iterations or 1]
    assert texts[0] == texts[1] and len(texts[0]) == 12 and len(set(texts[0])) > 1


@pytest.mark.parametrize("case", ["D-2", "C-4", "depth-2"])
def test_one_cache_for_all_iterations_would_be_wrong(case, monkeypatch):
    """What the tests above would miss if the iterations of these models hardly differed."""
    overrides, iterations = CASES[case]
    model, tokens = lively(**overrides), sequence(LENGTH)
    expected = whole(model, tokens, iterations)[1:]
    of_its_own = KeyValueCache.at
    monkeypatch.setattr(KeyValueCache, "at", lambda self, iteration, layer: of_its_own(self, 0, layer))
    shared = Cached(model, iterations, iterations * LENGTH)
    logits = torch.stack([shared.step(token) for token in tokens])[1:]
    assert (logits - expected).abs().max() > 100 * CLOSE["atol"]


def test_more_iterations_than_the_model_was_trained_with_need_no_new_cache():
    model, tokens = lively(iterations=2), sequence(LENGTH)
    torch.testing.assert_close(stepwise(model, tokens, 8, 3), whole(model, tokens, 8)[3:], **CLOSE)


def test_several_sequences_of_one_length():
    model = use_cached(lively())
    tokens = torch.tensor([sequence(LENGTH, seed) for seed in range(3)])
    positions = torch.arange(LENGTH).expand(3, LENGTH)
    with torch.no_grad():
        expected = logits_of(model, tokens, positions, iterations=2)
        cache = KeyValueCache(LENGTH)
        pieces = [
            logits_of(model, tokens[:, piece], positions[:, piece], cache, iterations=2)
            for piece in (slice(0, 7), slice(7, 8), slice(8, LENGTH))
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)


def use_cached(model):
    use_cache(model)
    use_cache(model)
    return model


def test_a_model_that_may_use_a_cache_computes_without_one_as_before():
    model, tokens = lively(), sequence(LENGTH)
    before = whole(model, tokens, 2)
    assert torch.equal(whole(use_cached(model), tokens, 2), before)


def test_a_block_without_attention_is_refused():
    model = lively()
    model.layers["1"].attention = None
    with pytest.raises(UserError, match="block 1 has no attention"):
        use_cache(model)


def test_generation_ends_with_the_end_mark_or_the_tokens():
    model, prompt = lively(), sequence(5)
    tokens = list(generate(Cached(model, 2, 25), prompt, Sampler(VOCABULARY, 0.0), 20))
    end = tokens[7]
    until = list(generate(Cached(model, 2, 25), prompt, Sampler(VOCABULARY, 0.0), 20, end))
    assert until == tokens[: tokens.index(end)]
