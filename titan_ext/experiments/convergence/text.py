"""The text of a comparison: what each site trains on at each step, and what all are measured on.

It depends on the seed and the sizes alone, so that every method sees the same tokens in the same order.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from titan_ext.data import ByteTokenizer, PackedTextDataset, open_corpus
from titan_ext.data.corpora.corpus import Corpus
from titan_ext.data.feed import CorpusFeed, Selection
from titan_ext.data.order import Split
from titan_ext.data.packing import Sample
from titan_ext.experiments.convergence.settings import Settings

_HOLDOUT = 0.05
# Sequences shuffled together. Packed text comes document by document, and a batch of one document's pieces would
# be far noisier than its size says.
_WINDOW = 2048
_VALIDATION_SEQUENCES, _TOGETHER = 256, 32


class Batch(NamedTuple):
    """Sequences of packed text; each tensor is int64 ``[sequences, length]``."""

    inputs: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def training_text(settings: Settings, seed: int) -> Iterator[list[Batch]]:
    """For each step, without end, a batch for each site; the sites share the documents out.

    Raises:
        UserError: the corpus cannot be read, or has too little text.
    """
    sites = [_site_text(settings, seed, site) for site in range(settings.sites)]
    while True:
        yield [_batch(list(islice(site, settings.batch))) for site in sites]


@lru_cache(maxsize=1)
def validation_text(settings: Settings) -> list[Batch]:
    """Batches of documents that no site trains on, the same for all seeds; spread evenly over these documents.

    Raises:
        UserError: the corpus cannot be read, or has too little text.
    """
    found = list(islice(_dataset(settings, "validation"), _VALIDATION_SEQUENCES * 64))
    chosen = found[:: max(1, len(found) // _VALIDATION_SEQUENCES)][:_VALIDATION_SEQUENCES]
    return [_batch(chosen[start : start + _TOGETHER]) for start in range(0, len(chosen), _TOGETHER)]


def _site_text(settings: Settings, seed: int, site: int) -> Iterator[Sample]:
    dataset = _dataset(settings, "train", seed, site, settings.sites)
    return _shuffled(dataset, np.random.default_rng([seed, site]))


def _dataset(settings: Settings, split: Split, seed: int = 0, share: int = 0, shares: int = 1) -> PackedTextDataset:
    """Packed documents of part ``share`` of ``shares`` of a split; training text starts anew at its end."""
    selection = Selection(
        seed=seed,
        shuffle=True,
        shuffle_buffer=_WINDOW,
        split=split,
        holdout_fraction=_HOLDOUT,
        share_index=share,
        share_count=shares,
    )
    feed = CorpusFeed(_corpus(settings.corpus), selection)
    dataset = PackedTextDataset(feed, ByteTokenizer(), settings.length, infinite=split == "train")
    dataset.check(settings.batch, workers=0)
    return dataset


@lru_cache(maxsize=1)
def _corpus(name: str) -> Corpus:
    return open_corpus(name)


def _shuffled(samples: Iterable[Sample], generator: np.random.Generator) -> Iterator[Sample]:
    """The samples in an order that is random within a window; the last window of them is left out."""
    source = iter(samples)
    window = list(islice(source, _WINDOW))
    for sample in source:
        place = int(generator.integers(len(window)))
        yield window[place]
        window[place] = sample


def _batch(samples: list[Sample]) -> Batch:
    return Batch(
        torch.stack([inputs["input"] for inputs, _ in samples]),
        torch.stack([labels for _, labels in samples]),
        torch.stack([inputs["positions"] for inputs, _ in samples]),
    )
