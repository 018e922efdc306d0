"""Validation losses of a training, and what a unigram model comes to on the same tokens."""

from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import nn

from titan_ext.experiments.abbie.evaluate import finite
from titan_ext.experiments.convergence.model import loss_of
from titan_ext.experiments.dept.arms import Vocabulary
from titan_ext.experiments.dept.settings import Measured
from titan_ext.experiments.dept.text import Texts, joined


class Meter:
    """Measures languages under one kind of vocabulary.

    Args:
        texts: of the comparison.
        vocabulary: which kind.
        languages: to measure.
    """

    def __init__(self, texts: Texts, vocabulary: Vocabulary, languages: Sequence[str]) -> None:
        self._batches = {language: texts.validation(vocabulary, language) for language in languages}
        self._unigram = {
            language: texts.unigram(vocabulary, language).cross_entropy(joined(batches).labels)
            for language, batches in self._batches.items()
        }
        self._losses: dict[str, list[float | None]] = {language: [] for language in languages}

    @torch.no_grad()
    def measure(self, models: Mapping[str, nn.Module]) -> float:
        """Note each language's loss under its model; returns their mean, in nats a token."""
        found = {}
        for language, batches in self._batches.items():
            found[language] = mean(float(loss_of(models[language], batch)) for batch in batches)
            self._losses[language].append(finite(found[language]))
        return mean(found.values())

    def measured(self, steps: Sequence[int]) -> Measured:
        """What was noted, and the steps after which that was."""
        return Measured(steps=list(steps), losses=self._losses, unigram=self._unigram)
