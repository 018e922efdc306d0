"""A small model that trains in the rehearsals of ``titan-ext bench goodput``, and its loss by what has reached it."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from titan_ext.experiments.models import initialised, loss_of
from titan_ext.experiments.text import Batch, validation_text
from titan_ext.semi_sync import SemiSync
from titan_ext.semi_sync.wire.ledger import RoundRecord

LENGTH, BATCH = 32, 2
_CLIP_NORM = 1.0
_LOOKS = 24
"""Times that the loss is measured."""


@dataclass(frozen=True, slots=True)
class Text:
    """What the sites train on: each its part of the documents."""

    sites: int
    corpus: str = "builtin:docs"
    batch: int = BATCH
    length: int = LENGTH


class SmallModel:
    """A site's model from one of its starts on.

    Args:
        config: the site's ``Trainer.Config``.
        batches: the site's text, which goes on where it was when the site starts again.
    """

    scale = 1.0
    at_every_step = True

    def __init__(self, config: Any, batches: Iterator[Batch]) -> None:
        self.model: nn.Module = initialised(copy.deepcopy(config.model_spec.model), 0, "cpu")
        self._batches = batches

    def compute_gradients(self) -> None:
        """Of the next batch, clipped at a norm of 1."""
        self.model.zero_grad()
        loss_of(self.model, next(self._batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)


class LossByTokens:
    """Measures what the sites share after committed rounds, on text that none trains on.

    Args:
        config: a site's ``Trainer.Config``.
        text: of the run.
        tokens: that are about to be trained on.
    """

    def __init__(self, config: Any, text: Text, tokens: float) -> None:
        self._model = initialised(copy.deepcopy(config.model_spec.model), 0, "cpu")
        self._validation = validation_text(text)[:2]
        self._every, self._next = tokens / _LOOKS, 0.0
        self._rounds: set[int] = set()
        self.tokens = 0
        self.losses: list[tuple[int, float]] = []
        """Loss in nats after so many tokens of committed rounds."""

    @torch.no_grad()
    def __call__(self, outer: SemiSync, record: RoundRecord) -> None:
        """A site has had a round."""
        if not record.committed or record.round in self._rounds:
            return
        self._rounds.add(record.round)
        self.tokens += record.tokens
        if self.tokens < self._next:
            return
        self._next = self.tokens + self._every
        for name, value in outer.global_parameters().items():
            self._model.get_parameter(name).copy_(value)
        losses = [loss_of(self._model, batch).item() for batch in self._validation]
        self.losses.append((self.tokens, sum(losses) / len(losses)))


def loss_after(losses: Sequence[tuple[int, float]], tokens: float) -> float:
    """The loss after so many tokens, on the line between its neighbours."""
    for (before, loss), (after, later) in pairwise(losses):
        if before <= tokens <= after:
            return loss + (later - loss) * (tokens - before) / (after - before)
    return losses[-1][1]
