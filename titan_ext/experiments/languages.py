"""Text by language: of a corpus, or of made-up languages, of which those with one first letter are related."""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from titan_ext.errors import UserError
from titan_ext.experiments.text import Batch, text_of_folder, validation_of_folder

_SYMBOLS = 24
_OWN = 0.35
"""Share of a made-up language's transitions that is not its family's."""
_FIRST = 97  # the byte of "a"
_TOGETHER = 32


class LanguageSettings(Protocol):
    """What text by language depends on: fields that an experiment's ``Settings`` have."""

    @property
    def corpus(self) -> str:
        """Folder with a folder for each language; empty for made-up languages."""

    @property
    def languages(self) -> list[str]: ...
    @property
    def batch(self) -> int:
        """Sequences of a batch."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""


def training(settings: LanguageSettings, language: str, seed: int) -> Iterator[Batch]:
    """Batches without end.

    Raises:
        UserError: a corpus cannot be read, or has too little text.
    """
    if settings.corpus:
        yield from text_of_folder(_Text(settings), seed, _folder(settings, language), 0, 1)
    generator = np.random.default_rng([seed, _number(language)])
    while True:
        yield _made_up(settings, language, generator, settings.batch)


def noise(settings: LanguageSettings, seed: int) -> Iterator[Batch]:
    """Batches without end of letters that are all equally likely, whatever stands before them."""
    generator = np.random.default_rng([seed, _number("noise")])
    while True:
        yield _of_symbols(generator.integers(_SYMBOLS, size=(settings.batch, settings.length + 1)))


def validation(settings: LanguageSettings, language: str, sequences: int = 128) -> list[Batch]:
    """Batches of 32 of text that no site trains on, the same for all seeds; raises as ``training`` does."""
    if settings.corpus:
        return validation_of_folder(_Text(settings), _folder(settings, language), sequences)
    generator = np.random.default_rng([2**31, _number(language)])
    return [_made_up(settings, language, generator, _TOGETHER) for _ in range(sequences // _TOGETHER)]


def check_text(settings: LanguageSettings) -> None:
    """Raises UserError if a language cannot be read, or has too little text."""
    for language in settings.languages:
        if settings.corpus and not Path(_folder(settings, language)).is_dir():
            raise UserError(f"--corpus {settings.corpus}: has no folder {language}")
        next(training(settings, language, 0))
        validation(settings, language)


class _Text:
    """What packed text of a corpus depends on."""

    def __init__(self, settings: LanguageSettings) -> None:
        self.corpus, self.sites = settings.corpus, len(settings.languages)
        self.batch, self.length = settings.batch, settings.length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Text) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))


def _folder(settings: LanguageSettings, language: str) -> str:
    return str(Path(settings.corpus).expanduser() / language)


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


@lru_cache(maxsize=64)
def _transitions(language: str) -> np.ndarray:
    """Cumulative probabilities of the next symbol after each symbol, ``[symbols, symbols]``."""
    mixed = np.zeros((_SYMBOLS, _SYMBOLS))
    for name, share in ((language[0], 1 - _OWN), (f"own {language}", _OWN)):
        drawn = np.random.default_rng(_number(name)).dirichlet(np.full(_SYMBOLS, 0.1), _SYMBOLS)
        mixed += share * drawn
    return mixed.cumsum(1)


def _made_up(settings: LanguageSettings, language: str, generator: np.random.Generator, sequences: int) -> Batch:
    """Text in which a symbol determines how likely the next is."""
    transitions = _transitions(language)
    symbols = generator.integers(_SYMBOLS, size=(sequences, settings.length + 1))
    draws = generator.random(symbols.shape)
    for place in range(1, settings.length + 1):
        chosen = (draws[:, place, None] > transitions[symbols[:, place - 1]]).sum(1)
        symbols[:, place] = np.minimum(chosen, _SYMBOLS - 1)
    return _of_symbols(symbols)


def _of_symbols(symbols: np.ndarray) -> Batch:
    """From ``[sequences, length + 1]``, each sequence a document."""
    text = torch.from_numpy(symbols + _FIRST)
    inputs, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return Batch(inputs, labels, torch.arange(inputs.shape[1]).expand_as(inputs).contiguous())
