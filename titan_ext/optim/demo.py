"""DeMo's inner half (arXiv 2411.19870): it gathers momentum; the parameters move when sites have exchanged it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.errors import InvalidValue
from titan_ext.optim.moments import Moment
from titan_ext.optim.wide import keep_wide, working_dtype


class DeMo(Optimizer):
    """``momentum = beta momentum + lr g``, in fp32 at least. The rest of the step is the method "demo".

    That moves the parameters when the sites have exchanged: ``x = x (1 - lr wd) - lr sign(…)``, with the factor and
    the rate of the step that are in the states ``decay`` and ``rate``.

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

    only_with_method = "demo"
    """The outer loop's method whose exchange moves the parameters."""
    rounds_at_random = True
    """Whether narrow parameters are rounded so, and their moments kept in fp32."""

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
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=working_dtype(parameter))
                # Of this step: a scheduler moves the group's before the sites exchange. Always new tensors: torch casts
                # a loaded one to the parameter's dtype, and bfloat16 would round the rate.
                state["rate"] = torch.tensor(float(group["lr"]))
                state["decay"] = torch.tensor(1 - float(group["lr"]) * group["weight_decay"])
            momenta = [self.state[each]["momentum"] for each in parameters]
            torch._foreach_mul_(momenta, group["beta"])
            pairs = zip(parameters, momenta, strict=True)
            torch._foreach_add_(momenta, [each.grad.to(momentum.dtype) * group["lr"] for each, momentum in pairs])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ``state_dict``; the momentum keeps its dtype, whatever the parameter's."""
        super().load_state_dict(state_dict)
        keep_wide(self, state_dict)
