"""Sums over a vocabulary of which each rank of a group may have some columns, with gradients.

Shapes: T tokens, V columns of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol


class _Together(torch.autograd.Function):
    """Sum of what the ranks of a group have. Each of them goes on alike, so its own part's gradient is the sum's."""

    @staticmethod
    def forward(_: Any, own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return funcol.all_reduce(own, reduceOp="sum", group=group)

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def total(own: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over the ranks of ``group``; ``own`` itself without one."""
    return own if group is None else _Together.apply(own, group)


def log_partition(logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Log of the softmax's denominator, ``[T]`` from this rank's columns ``[T, V]``."""
    if group is None:
        return torch.logsumexp(logits, dim=-1)
    highest = funcol.all_reduce(logits.detach().amax(-1), reduceOp="max", group=group)
    return highest + total((logits - highest[:, None]).exp().sum(-1), group).log()


def softened_divergence(
    teacher: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None, temperature: float
) -> torch.Tensor:
    """T^2 KL(teacher || own) at temperature T, summed over the vocabulary (arXiv 1503.02531, section 2.1).

    Args:
        teacher: logits without a gradient, this rank's columns ``[T, V]``.
        own: those that are trained.
        group: has the other columns; None where these are all.
        temperature: what logits are divided by.

    Returns:
        ``[T]``.
    """
    wanted, found = teacher / temperature, own / temperature
    wanted = wanted - log_partition(wanted, group)[:, None]
    # The probabilities sum to 1, so that the log of the own denominator stands alone: it is of all columns.
    parts = total((wanted.exp() * (wanted - found)).sum(-1), group)
    return temperature**2 * (parts + log_partition(found, group))
