"""A site's stream, each sequence of one source; and held-out text, one part for anchors and the rest for tests."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from titan_ext.data import ByteTokenizer
from titan_ext.errors import UserError
from titan_ext.experiments import languages
from titan_ext.experiments.adapt.arms import SOURCES, Settings
from titan_ext.experiments.text import Batch
from titan_ext.losses import Tokens

_HELD_OUT = 160
"""Sequences of a language, of which the first batch is for anchors."""


def mixture(settings: Settings, site: int, seed: int) -> Iterator[Batch]:
    """Batches without end, in which packed ``Tokens`` with the place of their source in ``SOURCES`` are the labels.

    Raises:
        UserError: a corpus cannot be read, or has too little text.
    """
    own_seed = seed * len(settings.names) + site
    texts = {name: _sequences(languages.training(settings, name, own_seed)) for name in settings.languages}
    others = [texts[name] for place, name in enumerate(settings.names) if place != site]
    in_turn = (sequence for sequences in zip(*others) for sequence in sequences)
    noise = _sequences(languages.noise(settings, own_seed))
    sources = (texts[settings.names[site]], in_turn, texts[settings.off_topic], noise)
    rest = (1 - settings.own_share) / (len(SOURCES) - 1)
    shares = [settings.own_share, *[rest] * (len(SOURCES) - 1)]
    generator = np.random.default_rng([seed, site])
    while True:
        chosen = generator.choice(len(SOURCES), settings.batch, p=shares)
        inputs, labels, positions = map(torch.stack, zip(*(next(sources[source]) for source in chosen)))
        source = torch.from_numpy(chosen)[:, None].expand_as(inputs)
        tokens = Tokens(labels, inputs, positions, source, torch.full_like(inputs, -1), positions)
        yield Batch(inputs, tokens.pack(), positions)


def texts_of(batches: Iterable[Batch]) -> Iterator[str]:
    """The text of each sequence."""
    tokenizer = ByteTokenizer()
    return (tokenizer.decode(sequence) for batch in batches for sequence in batch.inputs.tolist())


def anchors(settings: Settings, language: str) -> list[str]:
    """Texts that neither training nor ``evaluation`` has, the same for all seeds; raises as ``mixture`` does."""
    return list(texts_of(_held_out(settings, language)[:1]))


def evaluation(settings: Settings, language: str) -> list[Batch]:
    """Batches that losses are measured on, with plain labels, the same for all seeds; raises as ``mixture`` does."""
    return _held_out(settings, language)[1:]


def check_text(settings: Settings) -> None:
    """Raises UserError if a language cannot be read, or has too little text."""
    languages.check_text(settings)
    for name in settings.names:
        if not evaluation(settings, name):
            raise UserError(f"--corpus {settings.corpus}: files valid* of {name} are too short for anchors and a test")


def _held_out(settings: Settings, language: str) -> list[Batch]:
    return languages.validation(settings, language, _HELD_OUT)


def _sequences(batches: Iterable[Batch]) -> Iterator[Batch]:
    """One after another; each tensor is ``[length]``."""
    return (Batch(*sequence) for batch in batches for sequence in zip(*batch))
