"""One run: all sites of a method, trained from the seed's model on the seed's text, and measured after each sync."""

import hashlib
import math
import time
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext import optim
from titan_ext.experiments.convergence.methods import METHODS, Result, Settings
from titan_ext.experiments.models import loss_of, small_llama
from titan_ext.experiments.sites import DataParallel, InnerTraining, SemiSynchronous, Sites
from titan_ext.experiments.text import Batch, training_text, validation_text
from titan_ext.experiments.tuning import Run
from titan_ext.semi_sync import SemiSyncConfig

# Warm-up, constant, decay with 1 - sqrt over the last tenth: DES-LOC's runs (512 of 3072 steps of warm-up).
_WARMUP, _DECAY = 1 / 6, 0.1


def train(settings: Settings, run: Run) -> Result:
    """Train from the seed's model on the seed's text; measure every ``sync_every`` steps, when all sites are equal.

    A run that diverges ends at the next measurement.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    sites = build_sites(settings, run)
    validation = [batch.to(settings.device) for batch in validation_text(settings)]
    seen = hashlib.sha256()
    measured: list[tuple[int, float, int]] = []
    for step, batches in enumerate(training_text(settings, run.seed), start=1):
        for batch in batches:
            seen.update(batch.inputs.numpy().data)
        sites.step([batch.to(settings.device) for batch in batches])
        if step % settings.sync_every == 0:
            measured.append((step, _mean_loss(sites.models[0], validation), sites.bytes_sent()[0]))
            if step == settings.steps or not math.isfinite(measured[-1][1]):
                break
    sites.close()
    steps, losses, sent = zip(*measured)
    return Result(
        steps=list(steps),
        losses=[loss if math.isfinite(loss) else None for loss in losses],
        bytes_sent=list(sent),
        parameters=sum(each.numel() for each in sites.models[0].parameters()),
        tokens_sha256=seen.hexdigest(),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
    )


@torch.no_grad()
def _mean_loss(model: nn.Module, validation: list[Batch]) -> float:
    losses = [loss_of(model, batch) * batch.labels.numel() for batch in validation]
    return float(sum(losses)) / sum(batch.labels.numel() for batch in validation)


def build_sites(settings: Settings, run: Run) -> Sites:
    """The sites of a run, with equal models."""
    outer = METHODS[run.method].outer
    if outer is None:
        return DataParallel(_inner_training(settings, run), settings.sites)
    config = SemiSyncConfig(**outer, sync_every=settings.sync_every)
    return SemiSynchronous([_inner_training(settings, run) for _ in range(settings.sites)], config)


def _inner_training(settings: Settings, run: Run) -> InnerTraining:
    model = small_llama(settings, run.seed)
    return InnerTraining(model, _optimizer(settings, run, model), partial(rate, steps=settings.steps))


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
