"""One run: a variant trained from the seed's model on the seed's text, and evaluated at every number of iterations."""

import hashlib
import time
from itertools import islice
from typing import Any

import torch
from torch import nn
from torchtitan.components.optimizer import LRSchedulersContainer

from titan_ext.experiments.abbie.evaluate import drift, validation_loss
from titan_ext.experiments.abbie.model import build_model, compile_blocks, loss_of
from titan_ext.experiments.abbie.settings import Result, Settings
from titan_ext.experiments.abbie.variants import read_from
from titan_ext.experiments.convergence.settings import Run
from titan_ext.experiments.convergence.text import Batch, training_text, validation_text
from titan_ext.models.abbie.model import AbbieModel

# AdamW and warm-up, stay, decay as in AbbIE's paper; the fractions, weight decay and clipping are our choice.
_BETAS, _WEIGHT_DECAY, _CLIP_NORM = (0.9, 0.95), 0.1, 1.0
_WARMUP, _DECAY = 0.01, 0.2


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
    """Train, then evaluate as each variant that this training serves.

    Raises:
        UserError: the corpus cannot be read, or sizes do not fit.
    """
    started = time.perf_counter()
    model = build_model(settings, run.method, run.seed)
    digest = _fit(model, settings, run)
    return Result(
        **_evaluate(model, settings, run),
        parameters=sum(each.numel() for each in model.parameters()),
        tokens=settings.steps * settings.batch * settings.length,
        tokens_sha256=digest,
        seconds=time.perf_counter() - started,
    )


def _fit(model: AbbieModel, settings: Settings, run: Run) -> str:
    """Train in place; returns the hash of what was trained on."""
    if settings.compile:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.lr, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
    )
    warmup = max(1, round(_WARMUP * settings.steps))
    rates = LRSchedulersContainer.Config(warmup_steps=warmup, decay_ratio=_DECAY).build(
        optimizers=[optimizer], training_steps=settings.steps
    )
    seen = hashlib.sha256()
    for step, (batch,) in enumerate(islice(training_text(settings, run.seed), settings.steps)):
        seen.update(batch.inputs.numpy())
        model.set_step(step)
        loss_of(model, _on(settings.device, batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    return seen.hexdigest()


def _evaluate(model: AbbieModel, settings: Settings, run: Run) -> dict[str, Any]:
    """The fields of ``Result`` that are measured on held-out text."""
    validation = [_on(settings.device, batch) for batch in validation_text(settings)]
    losses, cosines, sizes = {}, {}, {}
    for variant in read_from(run.method):
        reader = build_model(settings, variant, run.seed)
        reader.load_state_dict(model.state_dict())
        reader.eval()
        losses[variant] = [validation_loss(reader, validation, count) for count in settings.iterations]
        cosines[variant], sizes[variant] = drift(reader, validation[0], settings.iterations)
    trained_loss = validation_loss(model.eval(), validation, model.config.iterations.train)
    return {"trained_loss": trained_loss, "losses": losses, "cosines": cosines, "sizes": sizes}


def _on(device: str, batch: Batch) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))
