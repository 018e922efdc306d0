"""A small model that trains in the rehearsals of ``titan-ext bench goodput``, and its loss after so many tokens."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titan_ext.experiments.models import initialised, loss_of
from titan_ext.experiments.text import Batch, validation_text
from titan_ext.semi_sync import SemiSync
from titan_ext.semi_sync.wire.ledger import RoundRecord

LENGTH, BATCH = 32, 4
_CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Text:
    """What the sites train on: each its part of the documents."""

    sites: int
    corpus: str = "builtin:docs"
    batch: int = BATCH
    length: int = LENGTH


class FinalLoss:
    """Counts the tokens of committed rounds, and measures once, on text that none trains on, what the sites share.

    Args:
        config: a site's ``Trainer.Config``.
        text: of the run.
        wanted: tokens after which the run ends: over them the learning rate falls to 0.
        seed: of the parameters.
    """

    def __init__(self, config: Any, text: Text, wanted: float, seed: int) -> None:
        self._model = config.model_spec.model
        self._text, self._wanted, self._seed = text, wanted, seed
        self._rounds: set[int] = set()
        self.tokens = 0
        self.loss: float | None = None
        """In nats, after the first committed round with which the tokens are complete; None before."""

    @property
    def rate(self) -> float:
        """Part of the learning rate: the same after as many tokens, however long they took."""
        return max(0.0, 1 - self.tokens / self._wanted)

    def initial(self) -> nn.Module:
        """The model as every site begins with it."""
        return initialised(copy.deepcopy(self._model), self._seed, "cpu")

    @torch.no_grad()
    def __call__(self, outer: SemiSync, record: RoundRecord) -> None:
        """A site has had a round."""
        if not record.committed or record.round in self._rounds or self.loss is not None:
            return
        self._rounds.add(record.round)
        self.tokens += record.tokens
        if self.tokens < self._wanted:
            return
        model = self.initial()
        for name, value in outer.global_parameters().items():
            model.get_parameter(name).copy_(value)
        losses = [loss_of(model, batch).item() for batch in validation_text(self._text)]
        self.loss = sum(losses) / len(losses)


class SmallModel:
    """A site's model from one of its starts on.

    Args:
        run: whose learning rate it goes by.
        batches: the site's text, which goes on where it was when the site starts again.
    """

    scale = 1.0
    at_every_step = True

    def __init__(self, run: FinalLoss, batches: Iterator[Batch]) -> None:
        self.model: nn.Module = run.initial()
        self._run, self._batches = run, batches

    @property
    def rate(self) -> float:
        """See ``FinalLoss``."""
        return self._run.rate

    def compute_gradients(self) -> None:
        """Of the next batch, clipped at a norm of 1."""
        self.model.zero_grad()
        loss_of(self.model, next(self._batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
