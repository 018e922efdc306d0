"""The arithmetic of LoRDO's local step (arXiv 2602.04396), on local shards, with the sums that make it exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.optim import low_rank_layout as layout
from titan_ext.optim.rounding import copy_randomly


@dataclass(frozen=True, slots=True)
class Matrix:
    """One low-rank parameter in a step; tensors are local and in the dtype of the arithmetic."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    signal: torch.Tensor  # the gradient plus the error fed back; the error's own storage where there is one
    basis: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    step: int  # with this one
    dim: int  # the dimension of the parameter that the basis spans
    seed: int  # of the noise that rounds the parameter where it is narrower

    def lowered(self) -> torch.Tensor:
        return self.signal @ self.basis if self.dim == 1 else self.basis.mT @ self.signal

    def add_lifted(self, to: torch.Tensor, low: torch.Tensor, alpha: float) -> None:
        factors = (low, self.basis.mT) if self.dim == 1 else (self.basis, low)
        to.addmm_(*factors, alpha=alpha)


def take_step(group: dict[str, Any], matrices: list[Matrix]) -> None:
    """Move the matrices' parameters, moments and errors, in place, by the equations of ``LowRankAdamW``."""
    lr, omega, (beta1, beta2) = float(group["lr"]), group["omega"], group["betas"]
    parameters = [each.parameter for each in matrices]
    lowered = [each.lowered() for each in matrices]
    layout.sum_over_shards(lowered, parameters, [each.dim for each in matrices])
    if group["error_feedback"]:
        for each, low in zip(matrices, lowered, strict=True):
            each.add_lifted(each.signal, low, alpha=-1)
    moments, squares = [each.first for each in matrices], [each.second for each in matrices]
    torch._foreach_lerp_(moments, lowered, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, lowered, lowered, value=1 - beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, [math.sqrt(1 - beta2**each.step) for each in matrices])
    torch._foreach_add_(denominators, group["eps"])
    means = _means(matrices, denominators) if omega < 1 else [None] * len(matrices)
    for each, low, mean in zip(matrices, torch._foreach_div(moments, denominators), means, strict=True):
        weight = layout.local(each.parameter)
        worked = weight.to(each.gradient.dtype)
        worked.mul_(1 - lr * group["weight_decay"])
        each.add_lifted(worked, low, alpha=-lr * omega / (1 - beta1**each.step))
        if mean is not None:
            worked.addcdiv_(each.gradient, mean, value=-lr * (1 - omega))
        if worked is not weight:
            copy_randomly(weight, worked, each.seed)


def size(parameter: torch.Tensor, signal: torch.Tensor) -> float:
    """The sum of what ``signal``, a local tensor cut as ``parameter`` is, holds on all ranks, without signs."""
    total = signal.abs().sum()
    layout.sum_over_shards([total], [parameter], [0], [1])
    return float(total)


def _means(matrices: list[Matrix], denominators: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The mean entry of each whole denominator: the paper's mu, as its author's code reads it."""
    sums = [each.sum() for each in denominators]
    layout.sum_over_shards(sums, [each.parameter for each in matrices], [1 - each.dim for each in matrices])
    sizes = [each.basis.shape[1] * each.parameter.shape[1 - each.dim] for each in matrices]
    return torch._foreach_div(sums, [float(each) for each in sizes])
