"""One run, from the first step to the last measurement."""

import hashlib
import math
import time

import torch
from torch import nn

from titan_ext.experiments.convergence.model import loss_of
from titan_ext.experiments.convergence.settings import Result, Run, Settings
from titan_ext.experiments.convergence.text import Batch, training_text, validation_text
from titan_ext.experiments.convergence.trainers import build_trainer


class Trainee:
    """A process's part in a comparison.

    Args:
        settings: those of the comparison.
        threads: threads that torch may compute with.
    """

    def __init__(self, settings: Settings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._settings = settings

    def train(self, run: Run) -> Result:
        """Train one run."""
        return train(self._settings, run)


def train(settings: Settings, run: Run) -> Result:
    """Train from the seed's model on the seed's text; measure every ``sync_every`` steps, when all sites are equal.

    A run that diverges ends at the next measurement.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer = build_trainer(settings, run)
    validation = [_on(settings.device, batch) for batch in validation_text(settings)]
    seen = hashlib.sha256()
    measured: list[tuple[int, float, int]] = []
    for step, batches in enumerate(training_text(settings, run.seed), start=1):
        for batch in batches:
            seen.update(batch.inputs.numpy())
        trainer.step([_on(settings.device, batch) for batch in batches])
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


def _on(device: str, batch: Batch) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
