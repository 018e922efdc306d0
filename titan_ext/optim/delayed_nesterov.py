"""Nesterov's momentum for updates that arrive in parts (arXiv 2401.09135, algorithm 3, "DN")."""

from collections.abc import Iterable
from typing import Any

import torch

from titan_ext.optim.exact import ExactOptimizer, divide_


class DelayedNesterov(ExactOptimizer):
    """SGD whose momentum is renewed by the mean of ``cycle`` gradients, once they are all there.

    With N for ``cycle`` and c for ``spread``: each gradient moves the parameter by ``lr g / N`` and by ``lr c mu v``; the
    last of a cycle makes ``v = mu v + mean`` and moves it by ``lr (1 - c N + c) mu v`` instead. Of N gradients that were
    taken at one point that comes, with c = 0, to one step of Nesterov's with their mean; a momentum renewed by each of
    them would take it into account N times. Rounded alike on all machines.

    Args:
        params: parameters or groups of them.
        lr: learning rate, at least 0.
        momentum: mu, from 0 to below 1.
        cycle: gradients of a cycle, at least 1.
        spread: share of the momentum that each gradient applies, from 0 to 1 / cycle.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.9, cycle: int = 4, spread: float = 0.0) -> None:
        if lr < 0:
            raise ValueError(f"lr = {lr}: must be at least 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum}: must be from 0 to below 1")
        if cycle < 1:
            raise ValueError(f"cycle = {cycle}: must be at least 1")
        if not 0 <= spread <= 1 / cycle:
            raise ValueError(f"spread = {spread}: must be from 0 to 1 / cycle")
        super().__init__(params, {"lr": lr, "momentum": momentum, "cycle": cycle, "spread": spread})

    def _initial(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "momentum_buffer": torch.zeros_like(parameter),
            "gradient_sum": torch.zeros_like(parameter),
        }

    def _step_piece(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> None:
        momentum, cycle, spread = group["momentum"], group["cycle"], group["spread"]
        velocity, total = state["momentum_buffer"], state["gradient_sum"].add_(gradient)
        share = spread
        if int(state["step"]) % cycle == 0:
            velocity.mul_(momentum).add_(divide_(total.clone(), cycle))
            total.zero_()
            share = 1 - spread * cycle + spread
        direction = divide_(gradient.clone(), cycle).add_(velocity * (share * momentum))
        parameter.sub_(direction * group["lr"])
