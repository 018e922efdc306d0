"""Batches of packed bytes of a corpus: what each site trains on at each step, and what all methods are measured on.

The text depends on the seed and the sizes alone, so that every method sees the same tokens in the same order.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch

from titan_ext.data import ByteTokenizer, PackedTextDataset, open_corpus
from titan_ext.data.corpora.corpus import Corpus
from titan_ext.data.feed import CorpusFeed, Selection
from titan_ext.data.order import Split
from titan_ext.data.packing import Sample

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

    def to(self, device: str) -> "Batch":
        """The same on a device."""
        return Batch(*(tensor.to(device) for tensor in self))


def joined(batches: Iterable[Batch]) -> Batch:
    """One batch of the sequences of all."""
    return Batch(*map(torch.cat, zip(*batches)))


class TextSettings(Protocol):
    """What text depends on: fields that an experiment's ``Settings`` have. Hashable."""

    @property
    def corpus(self) -> str: ...
    @property
    def sites(self) -> int: ...
    @property
    def batch(self) -> int:
        """Sequences that a site trains on in a step."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""

    def __hash__(self) -> int: ...


def training_text(settings: TextSettings, seed: int) -> Iterator[list[Batch]]:
    """For each step, without end, a batch for each site; the sites share the documents out.

    Raises:
        UserError: the corpus cannot be read, or has too little text.
    """
    sites = [_site_text(settings, seed, site) for site in range(settings.sites)]
    while True:
        yield [stacked(list(islice(site, settings.batch))) for site in sites]


@lru_cache(maxsize=1)
def validation_text(settings: TextSettings) -> list[Batch]:
    """Batches of documents that no site trains on, the same for all seeds; spread evenly over these documents.

    Raises:
        UserError: the corpus cannot be read, or has too little text.
    """
    found = list(islice(_dataset(settings, "validation"), _VALIDATION_SEQUENCES * 64))
    chosen = found[:: max(1, len(found) // _VALIDATION_SEQUENCES)][:_VALIDATION_SEQUENCES]
    return [stacked(chosen[start : start + _TOGETHER]) for start in range(0, len(chosen), _TOGETHER)]


def check_text(settings: TextSettings) -> None:
    """Raises UserError if the corpus cannot be read, or has too little text."""
    validation_text(settings)
    next(training_text(settings, seed=0))


def text_of_folder(settings: TextSettings, seed: int, folder: str, share: int, shares: int) -> Iterator[Batch]:
    """Batches without end of part ``share`` of ``shares`` of a folder's training files, which are called so.

    Raises:
        UserError: there are none, they cannot be read, or they have too little text.
    """
    dataset = _dataset(settings, "train", seed, share, shares, folder)
    samples = shuffled(dataset, seed, share)
    while True:
        yield stacked(list(islice(samples, settings.batch)))


def text_of_share(settings: TextSettings, seed: int, share: int, shares: int) -> Iterator[Batch]:
    """Batches without end of part ``share`` of ``shares`` of the documents that are not held out; raises as above."""
    dataset = _dataset(settings, "train", seed, share, shares)
    samples = shuffled(dataset, seed, share)
    while True:
        yield stacked(list(islice(samples, settings.batch)))


@lru_cache(maxsize=64)
def validation_of_folder(settings: TextSettings, folder: str, sequences: int) -> list[Batch]:
    """Batches of a folder's validation files, which are called so, spread evenly over their documents; raises as above."""
    found = list(islice(_dataset(settings, "validation", folder=folder), sequences * 64))
    chosen = found[:: max(1, len(found) // sequences)][:sequences]
    return [stacked(chosen[start : start + _TOGETHER]) for start in range(0, len(chosen), _TOGETHER)]


def _site_text(settings: TextSettings, seed: int, site: int) -> Iterator[Sample]:
    dataset = _dataset(settings, "train", seed, site, settings.sites)
    return shuffled(dataset, seed, site)


def _dataset(
    settings: TextSettings, split: Split, seed: int = 0, share: int = 0, shares: int = 1, folder: str = ""
) -> PackedTextDataset:
    """Packed documents of part ``share`` of ``shares`` of a split; training text starts anew at its end.

    Args:
        settings: of the text.
        split: told by a hash of the documents, or, of a folder, by the names of its files.
        seed: of the order.
        share: of the documents.
        shares: how many there are.
        folder: in place of the settings' corpus.
    """
    holdout = 0.0 if folder else _HOLDOUT
    selection = Selection(
        seed=seed,
        shuffle=True,
        shuffle_buffer=_WINDOW,
        split=split,
        holdout_fraction=holdout,
        share_index=share,
        share_count=shares,
    )
    feed = CorpusFeed(_split_of_folder(folder, split) if folder else _corpus(settings.corpus), selection)
    dataset = PackedTextDataset(feed, ByteTokenizer(), settings.length, infinite=split == "train")
    dataset.check(settings.batch, workers=0)
    return dataset


@lru_cache(maxsize=1)
def _corpus(name: str) -> Corpus:
    return open_corpus(name)


@lru_cache(maxsize=64)
def _split_of_folder(folder: str, split: Split) -> Corpus:
    return open_corpus(folder, split=split)


def shuffled(samples: Iterable[Sample], seed: int, site: int) -> Iterator[Sample]:
    """The samples in an order that is random within a window; the last window of them is left out."""
    generator = np.random.default_rng([seed, site])
    source = iter(samples)
    window = list(islice(source, _WINDOW))
    for sample in source:
        place = int(generator.integers(len(window)))
        yield window[place]
        window[place] = sample


def stacked(samples: list[Sample]) -> Batch:
    """One batch of samples."""
    return Batch(
        torch.stack([inputs["input"] for inputs, _ in samples]),
        torch.stack([labels for _, labels in samples]),
        torch.stack([inputs["positions"] for inputs, _ in samples]),
    )
