"""The unigram model: invariant 13 of DEPT and its smoothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from titan_ext.data import Unigram


@pytest.mark.parametrize("vocabulary", [1, 7, 50_257])
def test_a_uniform_stream_costs_the_log_of_the_vocabulary(vocabulary: int) -> None:
    stream = torch.arange(vocabulary).repeat(3)
    unigram = Unigram(torch.bincount(stream, minlength=vocabulary))
    assert unigram.cross_entropy(stream) == pytest.approx(math.log(vocabulary), abs=1e-12)


def test_a_unigram_models_normalised_loss_is_zero() -> None:
    stream = torch.randint(0, 5, (400,), generator=torch.Generator().manual_seed(0)) ** 2
    unigram = Unigram(torch.bincount(stream, minlength=20))
    logits = unigram.log_probabilities.expand(len(stream), -1)
    assert float(F.cross_entropy(logits, stream)) - unigram.cross_entropy(stream) == pytest.approx(0, abs=1e-12)


def test_unseen_tokens_are_possible_and_probabilities_sum_to_one() -> None:
    unigram = Unigram(torch.tensor([3, 0, 1]))
    assert unigram.log_probabilities.exp().tolist() == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    assert unigram.cross_entropy(torch.tensor([[1, 1], [0, 2]])) == pytest.approx(
        -(2 * math.log(1 / 7) + math.log(4 / 7) + math.log(2 / 7)) / 4
    )


@pytest.mark.parametrize("tokens", [[], [3], [-100], [0, -1]])
def test_tokens_it_does_not_know_are_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        Unigram(torch.tensor([1, 1, 1])).cross_entropy(torch.tensor(tokens, dtype=torch.int64))


@pytest.mark.parametrize("counts", [torch.tensor([1, -1]), torch.zeros(0), torch.zeros(2, 2)])
def test_bad_counts_are_refused(counts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="counts"):
        Unigram(counts)
