"""LoRDO's low-rank bases (arXiv 2602.04396): how one is found, and what a new one does to the moments."""

import logging
import math
import random

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from titan_ext.optim.low_rank_layout import projected_dim
from titan_ext.optim.wide import working_dtype

logger = logging.getLogger(__name__)

# Random directions beyond the rank, which a subspace iteration needs to tell the last of its vectors apart.
_SPARE = 8
# Rows squared at once in float64: bounds the temporaries.
_ROWS = 4096


@torch.no_grad()
def projection(matrix: torch.Tensor, rank: int, power_iterations: int = 0) -> torch.Tensor:
    """The first singular vectors of ``matrix`` on its shorter side: LoRDO's ComputeProjection.

    They are exact (from a float64 Gram matrix) or, with ``power_iterations``, found by that many subspace
    iterations from random directions that are the same everywhere. A matrix that is zero or not finite has
    the basis of those directions. All ranks of a DTensor's mesh must call this; they get the bits of its first.

    Args:
        matrix: ``[rows, columns]``, a whole tensor or a DTensor of any placements.
        rank: vectors wanted, from 1 to the shorter side.
        power_iterations: 0 for the exact vectors.

    Returns:
        ``[min(rows, columns), rank]``, whole, orthonormal columns, in float32 or the matrix's wider dtype.

    Raises:
        ValueError: ``rank`` is outside its range.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank = {rank}: must be from 1 to {min(matrix.shape)}, the shorter side of the matrix")
    if not isinstance(matrix, DTensor):
        return _singular_vectors(matrix, rank, power_iterations)
    mesh, whole = matrix.device_mesh, matrix.full_tensor()
    if any(mesh.get_coordinate()):
        basis = whole.new_empty(min(whole.shape), rank, dtype=working_dtype(whole))
    else:
        basis = _singular_vectors(whole, rank, power_iterations)  # contiguous: Gloo broadcasts what is in memory
    # Ranks with other hardware or thread counts would round differently, and drift apart.
    for mesh_dim in range(mesh.ndim):
        dist.broadcast(basis, group=mesh.get_group(mesh_dim), group_src=0)
    return basis


def coordinate_basis(side: int, rank: int) -> torch.Tensor:
    """``rank`` of the ``side`` coordinates as columns ``[side, rank]``, drawn the same on every machine, to the bit."""
    basis = torch.zeros(side, rank)
    basis[sorted(random.Random(side).sample(range(side), rank)), range(rank)] = 1.0
    return basis


def random_basis(side: int, rank: int) -> torch.Tensor:
    """Random orthonormal columns ``[side, rank]`` in float64, the same at each call and on all ranks."""
    generator = torch.Generator().manual_seed(side)
    return torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64)).Q


def rotated(
    first: torch.Tensor, second: torch.Tensor, rotation: torch.Tensor, dim: int, corrections: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's moments in a new basis (LDAdam's rule): the second as if the coordinates were uncorrelated.

    ``u' = R u``; ``v' = c2 [(R*R) max(v/c2 - (u/c1)^2, 0) + (R u/c1)^2]``.

    Args:
        first, second: moments in the old basis, local: ``[rows, rank]`` if ``dim`` is 1, else ``[rank, columns]``.
        rotation: ``R = Q_new^T Q_old``, ``[rank, rank]``.
        dim: :func:`projected_dim` of the matrix.
        corrections: ``(c1, c2)``, which the moments are divided by to correct their bias.
    """

    def turn(by: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        return moment @ by.mT if dim == 1 else by @ moment

    mean = turn(rotation, first / corrections[0])
    variance = (second / corrections[1] - (first / corrections[0]) ** 2).clamp_(min=0)
    squares = turn(rotation * rotation, variance) + mean * mean
    return turn(rotation, first), squares * corrections[1]


def _singular_vectors(matrix: torch.Tensor, rank: int, power_iterations: int) -> torch.Tensor:
    tall = (matrix if projected_dim(matrix.shape) == 1 else matrix.mT).to(working_dtype(matrix))
    largest = float(tall.abs().amax())
    if 0 < largest < math.inf:
        try:
            scaled = tall / largest
            basis = _iterated(scaled, rank, power_iterations) if power_iterations else _principal(scaled, rank)
            return basis.to(tall).contiguous()
        except torch.linalg.LinAlgError:
            logger.warning("No singular vectors for a matrix of shape %s; taking a random basis", [*matrix.shape])
    return random_basis(tall.shape[1], rank).to(tall).contiguous()


def _principal(tall: torch.Tensor, rank: int) -> torch.Tensor:
    """The right singular vectors: eigenvectors of a Gram matrix, whose float64 makes up for the squares."""
    gram = sum(part.double().mT @ part.double() for part in tall.split(_ROWS))
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)


def _iterated(tall: torch.Tensor, rank: int, iterations: int) -> torch.Tensor:
    span = random_basis(tall.shape[1], min(rank + _SPARE, tall.shape[1])).to(tall)
    for _ in range(iterations):
        span = torch.linalg.qr(tall.mT @ (tall @ span)).Q
    return span @ _principal(tall @ span, rank).to(tall)
