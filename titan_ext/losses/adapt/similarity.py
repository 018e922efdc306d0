"""ADAPT's equations (arXiv 2605.05227): from hidden states to a sample's weight.

Shapes: L tokens of a sequence, D width of the model, P samples of a sequence at most. A sample is a piece of a document,
or a block of tokens.
"""

import torch
import torch.nn.functional as F

EPSILON = 1e-8
NEUTRAL = 0.5
"""The gate of a similarity of 0."""


def samples(positions: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sample each token belongs to, and its place in it.

    Args:
        positions: int64 ``[L]``, 0 where a piece of a document begins; the first is 0.
        block: tokens of a sample; None for a document's piece.

    Returns:
        two int64 ``[L]``, both from 0.
    """
    if block is None:
        # A sequence that goes on from another may begin above 0.
        return (positions == 0).cumsum(0).sub(1).clamp_min(0), positions
    place = torch.arange(len(positions), device=positions.device)
    return place // block, place % block


def pooled(hidden: torch.Tensor, sample: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Each sample's embedding of length 1: its hidden states, each weighted by its place (equation 9).

    Args:
        hidden: ``[L, D]``.
        sample: int64 ``[L]``.
        weight: ``[L]``, the place counted from 1, and 0 for tokens that do not count.

    Returns:
        fp32 ``[L, D]``, zero where there is no sample. The equation's divisor cancels in the length.
    """
    found = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    found.index_add_(0, sample, hidden.float() * weight[:, None])
    return F.normalize(found, dim=-1, eps=EPSILON)


def similarity(embedding: torch.Tensor, centroid: torch.Tensor) -> torch.Tensor:
    """Mean cosine to the anchors, ``[P]`` (equation 10): the product with their mean, which has not length 1."""
    return embedding @ centroid


def gate(score: torch.Tensor, temperature: float) -> torch.Tensor:
    """A sample's weight, from its score alone (equation 11)."""
    return torch.sigmoid(score / max(temperature, EPSILON))


def sums(values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Sum of ``values`` ``[L]`` over each sample, ``[L]``."""
    return torch.zeros(len(sample), dtype=torch.float32, device=sample.device).index_add_(0, sample, values.float())
