"""Losses that can be compared between vocabularies: beside a model's, that of a unigram model of the same tokens.

UNIGRAM-CE and the loss normalised by it are those of DEPT (arXiv 2410.05021, section 4.3).
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.config.load import Site
from titan_ext.config.resolved import site_tokenizer
from titan_ext.data.loader import TextDataLoader, open_feed
from titan_ext.data.tokenizers.counting import count_tokens
from titan_ext.data.tokenizers.trimmed import TrimmedTokenizer
from titan_ext.data.tokenizers.unigram import Unigram
from titan_ext.export.trained import site_checkpoint
from titan_ext.inference.checkpoint import Weights
from titan_ext.inference.model import default_iterations, load_model
from titan_ext.inference.perplexity import measure
from titan_ext.inference.text import Batch, evaluation_text


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over the tokens of a text, in nats a token."""

    name: str
    """Whose model: a site's name, or "total"."""
    tokens: int
    """Tokens that were predicted."""
    loss: float
    unigram: float
    """UNIGRAM-CE: the loss of each token's frequency in the text that the model was trained on."""
    unknown: float
    """Part of the tokens that the vocabulary does not hold."""

    @property
    def normalised(self) -> float:
        """Unigram-normalised loss: how much better than the frequencies, below 0."""
        return self.loss - self.unigram

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def measure_site(
    site: Site, *, corpus: str | None, tokens: int, step: int | None = None, weights: Weights = "global"
) -> Figures:
    """Measure a site's checkpoint on text that its training left out.

    Args:
        site: whose model and tokenizer it is.
        corpus: other text, as in ``data``; None for what training left out.
        tokens: to predict, at most.
        step: of the checkpoint; None: the latest.
        weights: whose they are.

    Raises:
        UserError: the checkpoint or the text cannot be used.
        RunError: the checkpoint cannot be read.
    """
    checkpoint = site_checkpoint(site, step)
    batch_size = site.config.training.local_batch_size
    batches = evaluation_text(site, corpus, tokens, batch_size, checkpoint.trained_with()).batches
    tokenizer, labels = site_tokenizer(site.config), labels_of(batches)
    unigram = frequencies(site.config.dataloader, tokenizer)
    model = load_model(site, checkpoint, weights=weights)
    found = measure(model, batches, default_iterations(site))
    return Figures(site.name, found.tokens, found.loss, unigram.cross_entropy(labels), _unknown(tokenizer, labels))


def total(figures: Sequence[Figures]) -> Figures:
    """The means over all tokens of all sites."""
    tokens = sum(each.tokens for each in figures)
    means = (
        sum(getattr(each, name) * each.tokens for each in figures) / tokens for name in ("loss", "unigram", "unknown")
    )
    return Figures("total", tokens, *means)


def frequencies(data: TextDataLoader.Config, tokenizer: BaseTokenizer) -> Unigram:
    """The unigram model of the documents that a site trains on, all of which are read; stderr says how far.

    Raises:
        UserError: a document cannot be read.
    """
    return Unigram(count_tokens(open_feed(data), tokenizer, progress=lambda line: print(line, file=sys.stderr)))


def labels_of(batches: Iterable[Batch]) -> torch.Tensor:
    """All tokens that are predicted, ``[tokens]`` int64."""
    return torch.cat([labels.flatten() for _, labels in batches])


def _unknown(tokenizer: BaseTokenizer, labels: torch.Tensor) -> float:
    if not isinstance(tokenizer, TrimmedTokenizer) or tokenizer.unknown_id is None:
        return 0.0
    return (labels == tokenizer.unknown_id).double().mean().item()
