"""DeMo's inner half (arXiv 2411.19870): it gathers momentum; the parameters move when sites have exchanged it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.errors import InvalidValue
from titan_ext.optim.moments import Moment


class DeMo(Optimizer):
    """``x = x (1 - lr wd)``; ``momentum = beta momentum + lr g``. The rest of the step is the method "demo".

    Args:
        params: parameters or groups of them.
        lr: learning rate, at least 0.
        beta: decay of the momentum, from 0 to below 1.
        weight_decay: decoupled, at least 0.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, beta: float = 0.999, weight_decay: float = 0.0) -> None:
        if lr < 0:
            raise InvalidValue("lr", lr, "must be at least 0")
        if not 0 <= beta < 1:
            raise InvalidValue("beta", beta, "must be from 0 to below 1")
        if weight_decay < 0:
            raise InvalidValue("weight_decay", weight_decay, "must be at least 0")
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @staticmethod
    def moments(settings: Mapping[str, Any], name: str, shape: Sequence[int]) -> dict[str, Moment]:
        """See ``titan_ext.optim.moments``."""
        return {"momentum": Moment(1, settings["beta"])}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take in the gradients; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                # The rate of this step: a scheduler moves the group's before the sites exchange. Always a new
                # tensor: torch casts a loaded one to the parameter's dtype, and bfloat16 would round the rate.
                self.state[parameter]["rate"] = torch.tensor(float(group["lr"]))
            momenta = [self.state[each]["momentum"] for each in parameters]
            torch._foreach_mul_(momenta, group["beta"])
            torch._foreach_add_(momenta, [each.grad * group["lr"] for each in parameters])
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        return loss
