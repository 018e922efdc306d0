"""All sites of a run: data parallelism, or a model at each site and an outer loop between them.

Sites take their inner steps one after another and meet after each, on threads of their own, in the outer loop
of ``titan_ext.semi_sync``: what is exchanged, applied and counted is what a real run does.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from titan_ext import optim
from titan_ext.experiments.convergence.methods import METHODS
from titan_ext.experiments.convergence.model import build_model, loss_of
from titan_ext.experiments.convergence.settings import Run, Settings
from titan_ext.experiments.convergence.text import Batch
from titan_ext.semi_sync import SemiSync, SiteOptions, SiteRanks
from titan_ext.semi_sync.testing.simulator import InProcessSites
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

# Warm-up, constant, decay with 1 - sqrt over the last tenth: DES-LOC's runs (512 of 3072 steps of warm-up).
_WARMUP, _DECAY = 1 / 6, 0.1
_CLIP_NORM = 1.0


class Trainer(Protocol):
    """All sites of a run."""

    model: nn.Module
    """That of the first site."""

    def step(self, batches: Sequence[Batch]) -> None:
        """One inner step of every site on its batch, and the exchange that is due."""

    def bytes_sent(self) -> int:
        """Bytes that one site has sent."""

    def close(self) -> None:
        """After the last step."""


def build_trainer(settings: Settings, run: Run) -> Trainer:
    """The sites of a run, with equal models."""
    outer = METHODS[run.method].outer
    return DataParallel(settings, run) if outer is None else SemiSynchronous(settings, run, outer)


class DataParallel:
    """The gradients of all sites averaged at each step: one model, on the batches of all."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self._inner = _Inner(settings, run)
        self.model = self._inner.model
        gradient_bytes = sum(each.numel() * each.element_size() for each in self.model.parameters())
        self._bytes_a_step = ring_all_reduce_bytes(gradient_bytes, settings.sites)
        self._steps = 0

    def step(self, batches: Sequence[Batch]) -> None:
        # Sites have equally many tokens: the mean of their gradients is the gradient of the mean.
        self._inner.step(Batch(*map(torch.cat, zip(*batches))))
        self._steps += 1

    def bytes_sent(self) -> int:
        return self._bytes_a_step * self._steps

    def close(self) -> None:
        pass


class SemiSynchronous:
    """A model at each site, and the method's outer loop."""

    def __init__(self, settings: Settings, run: Run, outer: Mapping[str, object]) -> None:
        self._sites = InProcessSites(settings.sites)
        self._inner = [_Inner(settings, run) for _ in range(settings.sites)]
        self.model = self._inner[0].model
        config = SemiSync.Config(**outer, sync_every=settings.sync_every)
        self._outer = [
            config.build(
                model_parts=[inner.model],
                optimizers=inner.optimizer,
                manager=manager,
                site=SiteOptions(ranks=SiteRanks(alone=True)),
            )
            for inner, manager in zip(self._inner, self._sites.managers(), strict=True)
        ]
        self._sites.at_once(lambda site: self._outer[site].join())

    def step(self, batches: Sequence[Batch]) -> None:
        for inner, batch in zip(self._inner, batches, strict=True):
            inner.step(batch)
        self._sites.at_once(lambda site: self._outer[site].step())

    def bytes_sent(self) -> int:
        return self._outer[0].ledger.bytes_sent

    def close(self) -> None:
        self._sites.at_once(lambda site: self._outer[site].finish())
        self._sites.close()


class _Inner:
    """A model and its inner optimizer under the schedule of learning rates."""

    def __init__(self, settings: Settings, run: Run) -> None:
        self.model = build_model(settings, run.seed)
        self.optimizer = _optimizer(settings, run, self.model)
        self._rates = LambdaLR(self.optimizer, partial(rate, steps=settings.steps))

    def step(self, batch: Batch) -> None:
        loss_of(self.model, batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._rates.step()


def rate(step: int, *, steps: int) -> float:
    """Factor on the learning rate of inner step ``step`` (0 for the first) of ``steps``."""
    warmup, decay = max(1, round(_WARMUP * steps)), max(1, round(_DECAY * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 1 - math.sqrt(max(0, step - (steps - decay)) / decay)


def _optimizer(settings: Settings, run: Run, model: nn.Module) -> Optimizer:
    name, arguments = METHODS[run.method].inner(settings)
    build = getattr(optim, name, None) or getattr(torch.optim, name)
    names, parameters = zip(*model.named_parameters())
    return build([{"params": list(parameters), "param_names": list(names)}], lr=run.lr, **arguments)
