"""All sites of a run in one process: alone, data parallelism, or a model at each site and the outer loop between them.

Sites take their inner steps one after another and meet after each, on threads of their own, in the outer loop
of ``titan_ext.semi_sync``: what is exchanged, applied and counted is what a real run does.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from titan_ext.experiments.models import loss_of, train_step
from titan_ext.experiments.text import Batch, joined
from titan_ext.semi_sync import SemiSync, SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.ledger import RoundRecord, ring_all_reduce_bytes


class InnerTraining:
    """A model, its inner optimizer and the schedule of its learning rate.

    Args:
        model: on the device that its batches come to.
        optimizer: over its parameters.
        rate: factor on the learning rate by inner step, from 0.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, rate: Callable[[int], float]) -> None:
        self.model = model
        self.optimizer = optimizer
        self.rates = LambdaLR(optimizer, rate)

    def step(self, batch: Batch) -> float:
        """One inner step; returns its loss."""
        loss = loss_of(self.model, batch)
        train_step(self.model, loss, self.optimizer, self.rates)
        return loss.item()


class Sites(Protocol):
    """All sites of a run."""

    models: list[nn.Module]
    """One for each site; the same one where there is but one."""
    diverged: bool
    """Whether a training loss was no number, or a site's work was left out of a round because of one. The models hold no
    numbers any more then: the outer loop would go on from what the sites shared before, and the method would seem to
    train at a learning rate at which it does not."""

    def step(self, batches: Sequence[Batch]) -> None:
        """One inner step of every site on its batch, and the exchange that is due."""

    def bytes_sent(self) -> list[int]:
        """Bytes that each site has sent so far."""

    def close(self) -> None:
        """After the last step."""


def train_to_the_end(sites: Sites, texts: Sequence[Iterator[Batch]], steps: int, device: str) -> str:
    """Take all inner steps, or as many as there are until a run has diverged, and close the sites.

    Args:
        sites: those of the run.
        texts: of each site its batches, in host memory.
        steps: inner steps.
        device: where the sites train.

    Returns:
        the SHA-256 of what was trained on.
    """
    seen = hashlib.sha256()
    for _ in range(steps):
        batches = [next(text) for text in texts]
        for batch in batches:
            seen.update(batch.inputs.numpy().tobytes())
        sites.step([batch.to(device) for batch in batches])
        if sites.diverged:
            break
    sites.close()
    return seen.hexdigest()


class Alone:
    """Sites that never meet.

    Args:
        inner: each site's training.
    """

    def __init__(self, inner: Sequence[InnerTraining]) -> None:
        self._inner = inner
        self.models: list[nn.Module] = [each.model for each in inner]
        self.diverged = False

    def step(self, batches: Sequence[Batch]) -> None:
        for each, batch in zip(self._inner, batches, strict=True):
            each.step(batch)

    def bytes_sent(self) -> list[int]:
        return [0] * len(self.models)

    def close(self) -> None:
        pass


class DataParallel:
    """The gradients of all sites averaged at each step: one model, on the batches of all.

    Args:
        inner: the model's training.
        count: how many sites share it.
    """

    def __init__(self, inner: InnerTraining, count: int) -> None:
        self._inner = inner
        self.models = [inner.model] * count
        self.diverged = False
        gradients = sum(each.numel() * each.element_size() for each in inner.model.parameters())
        self._bytes_a_step = ring_all_reduce_bytes(gradients, count)
        self._steps = 0

    def step(self, batches: Sequence[Batch]) -> None:
        # Sites have equally many tokens: the mean of their gradients is the gradient of the mean.
        loss = self._inner.step(joined(batches))
        self._steps += 1
        self.diverged = self.diverged or not isfinite(loss)
        if self.diverged:
            _erase(self.models)

    def bytes_sent(self) -> list[int]:
        """Those of a ring all-reduce of the gradients in every step."""
        return [self._bytes_a_step * self._steps] * len(self.models)

    def close(self) -> None:
        pass


class SemiSynchronous:
    """A model at each site, and an outer loop.

    Args:
        inner: each site's training; what the sites share is equal.
        config: of the outer loop.
        options: for each site, fields of ``SiteOptions``.
    """

    def __init__(
        self,
        inner: Sequence[InnerTraining],
        config: SemiSyncConfig,
        options: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._inner = inner
        self.models = [each.model for each in inner]
        self.diverged = False
        self._sites = InProcessSites(len(inner))
        self._outer = self._sites.outer_loops(config, self.models, [each.optimizer for each in inner], options)

    def step(self, batches: Sequence[Batch]) -> None:
        losses = [inner.step(batch) for inner, batch in zip(self._inner, batches, strict=True)]
        self._sites.at_once(lambda site: self._outer[site].step())
        last = self._outer[0].ledger.last
        left_out = last is not None and last.participants < len(self.models)
        self.diverged = self.diverged or left_out or not all(map(isfinite, losses))
        if self.diverged:
            _erase(self.models)

    def outer_loop(self, site: int) -> SemiSync:
        """A site's outer loop."""
        return self._outer[site]

    def last_round(self) -> RoundRecord | None:
        """The first site's record of its last round; None before the first."""
        return self._outer[0].ledger.last

    def bytes_sent(self) -> list[int]:
        """By the outer loop's ledger."""
        return [outer.ledger.bytes_sent for outer in self._outer]

    def close(self) -> None:
        self._sites.at_once(lambda site: self._outer[site].finish())
        self._sites.close()


@torch.no_grad()
def _erase(models: Sequence[nn.Module]) -> None:
    for model in models:
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
