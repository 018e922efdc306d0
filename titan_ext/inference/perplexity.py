"""Perplexity of a model on packed text."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from titan_ext.inference.model import logits_of
from titan_ext.inference.text import Batch

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a pass over a text found."""

    iterations: int | None
    """Applications of the body; None for a model that does not iterate."""
    loss: float
    """Mean negative log-likelihood, in nats a token."""
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def measure(model: "Decoder", batches: Iterable[Batch], iterations: int | None) -> Measurement:
    """Predict every label once, each from its document's tokens in its own sequence.

    Args:
        model: in evaluation mode.
        batches: packed text.
        iterations: of a model that iterates; None for any other.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for inputs, labels in batches:
        logits = logits_of(model, inputs["input"].to(device), inputs["positions"].to(device), iterations=iterations)
        # A sequence at a time: all logits of a batch in fp32 at once may be more than the model itself.
        for row, label in zip(logits, labels.to(device), strict=True):
            total += F.cross_entropy(row.float(), label, reduction="sum").double().cpu()
        tokens += labels.numel()
    return Measurement(iterations, total.item() / tokens, tokens, time.perf_counter() - started)
