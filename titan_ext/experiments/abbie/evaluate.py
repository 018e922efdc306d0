"""What a trained model does at other numbers of iterations than it was trained with."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from titan_ext.experiments.abbie.model import loss_of
from titan_ext.experiments.convergence.text import Batch
from titan_ext.models.abbie.model import AbbieModel


@torch.no_grad()
def validation_loss(model: AbbieModel, validation: Iterable[Batch], iterations: int) -> float | None:
    """Mean loss of equal batches, in nats a token; None where it is no number."""
    losses = [float(loss_of(model, batch, iterations)) for batch in validation]
    return finite(sum(losses) / len(losses))


@torch.no_grad()
def drift(model: AbbieModel, batch: Batch, iterations: Sequence[int]) -> tuple[list[float | None], list[float | None]]:
    """How far iterating takes the tail's input from what the tail was trained on.

    Returns:
        For each number of iterations the mean cosine with the tail's input at as many as in training, and the
        norm as a multiple of its norm.
    """
    masks = model.get_attention_masks(batch.positions)
    start = model.head_forward(batch.inputs, batch.positions, masks)
    trained, *others = (
        model.iterate(start, count, batch.positions, masks) for count in (model.config.iterations.train, *iterations)
    )
    cosines = [F.cosine_similarity(other, trained, dim=-1).mean().item() for other in others]
    sizes = [(other.norm() / trained.norm()).item() for other in others]
    return [finite(each) for each in cosines], [finite(each) for each in sizes]


def finite(value: float) -> float | None:
    """The number; None for infinity and what is no number."""
    return value if math.isfinite(value) else None
