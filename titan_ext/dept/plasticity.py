"""How fast a body takes to a new vocabulary and text: DEPT's plasticity (arXiv 2410.05021, sections 3.4 and 4.4).

All parameters are trained, from a random embedding, by the paper's recipe of continued pre-training.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.models.common.decoder import Decoder

from titan_ext.inference.model import logits_of
from titan_ext.inference.text import Batch

WARMUP_STEPS = 100
"""Of the paper's 1,200; shorter adaptations warm up for a tenth of their steps."""

FINAL_FACTOR = 0.1
MAX_NORM = 1.0


def adapt(
    model: Decoder,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    evaluate: Callable[[], float],
    every: int,
) -> list[tuple[int, float]]:
    """Train all parameters, by a fresh AdamW under a cosine schedule with clipped gradients.

    Args:
        model: whole on one device; trained in place.
        batches: a step each.
        steps: how many.
        lr: the schedule's peak.
        evaluate: measures the model, which is then in evaluation mode.
        every: steps between two evaluations; the first is before the first step, the last after the last.

    Returns:
        the step and what ``evaluate`` returned, for each evaluation.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    schedule = LambdaLR(optimizer, partial(learning_rate_factor, steps=steps))
    curve = [(0, _evaluated(model, evaluate))]
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        _train_step(model, batch, optimizer)
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append((step, _evaluated(model, evaluate)))
    return curve


def learning_rate_factor(step: int, steps: int) -> float:
    """What the peak is multiplied by: linear warm-up, then a cosine down to a tenth.

    Args:
        step: from 0.
        steps: of the whole adaptation.
    """
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_FACTOR + (1 - FINAL_FACTOR) * (1 + math.cos(math.pi * progress)) / 2


def _train_step(model: Decoder, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    inputs, labels = batch
    device = next(model.parameters()).device
    optimizer.zero_grad()
    logits = logits_of(model, inputs["input"].to(device), inputs["positions"].to(device))
    F.cross_entropy(logits.flatten(0, 1).float(), labels.to(device).flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()


def _evaluated(model: Decoder, evaluate: Callable[[], float]) -> float:
    model.eval()
    found = evaluate()
    model.train()
    return found
