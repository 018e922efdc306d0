"""One run: all sites of a method, trained from the seed's model on the seed's text, and measured after each sync.

Sites take their inner steps one after another and meet after each, on threads of their own, in the outer loop
of ``titan_ext.semi_sync``: what is exchanged, applied and counted is what a real run does.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from titan_ext import optim
from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.convergence.methods import METHODS, Result, Settings
from titan_ext.experiments.models import initialised, loss_of, small_sizes, train_step
from titan_ext.experiments.text import Batch, joined, training_text, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.models import get_model_spec
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

# Warm-up, constant, decay with 1 - sqrt over the last tenth: DES-LOC's runs (512 of 3072 steps of warm-up).
_WARMUP, _DECAY = 1 / 6, 0.1


def train(settings: Settings, run: Run) -> Result:
    """Train from the seed's model on the seed's text; measure every ``sync_every`` steps, when all sites are equal.

    A run that diverges ends at the next measurement.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer = build_trainer(settings, run)
    validation = [batch.to(settings.device) for batch in validation_text(settings)]
    seen = hashlib.sha256()
    measured: list[tuple[int, float, int]] = []
    for step, batches in enumerate(training_text(settings, run.seed), start=1):
        for batch in batches:
            seen.update(batch.inputs.numpy())
        trainer.step([batch.to(settings.device) for batch in batches])
        if step % settings.sync_every == 0:
            measured.append((step, _mean_loss(trainer.model, validation), trainer.bytes_sent()))
            if step == settings.steps or not math.isfinite(measured[-1][1]):
                break
    trainer.close()
    steps, losses, sent = zip(*measured)
    return Result(
        steps=list(steps),
        losses=[loss if math.isfinite(loss) else None for loss in losses],
        bytes_sent=list(sent),
        parameters=sum(each.numel() for each in trainer.model.parameters()),
        tokens_sha256=seen.hexdigest(),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


@torch.no_grad()
def _mean_loss(model: nn.Module, validation: list[Batch]) -> float:
    losses = [loss_of(model, batch) * batch.labels.numel() for batch in validation]
    return float(sum(losses)) / sum(batch.labels.numel() for batch in validation)


def build_model(settings: Settings, seed: int) -> nn.Module:
    """A decoder in fp32, initialised from the seed, on the settings' device.

    Raises:
        UserError: the sizes do not fit each other.
    """
    sizes = small_sizes(settings.dim, settings.layers, settings.length)
    config = get_model_spec("llama3", "tiny", vocab_size=VOCABULARY, **sizes).model
    return initialised(config, seed, settings.device)


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
        self._inner.step(joined(batches))
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
        config = SemiSyncConfig(**outer, sync_every=settings.sync_every)
        models, optimizers = zip(*((inner.model, inner.optimizer) for inner in self._inner))
        self._outer = self._sites.outer_loops(config, models, optimizers)

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
        train_step(self.model, loss_of(self.model, batch), self.optimizer, self._rates)


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
