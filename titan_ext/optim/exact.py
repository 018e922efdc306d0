"""Optimizers whose bits do not depend on the machine, for steps that several machines take on equal values.

Each operation below is a single IEEE 754 one (a product, a sum, a quotient), rounded once. torch's own fused forms
(``addcdiv``, ``add`` with ``alpha``, ``lerp``) round once or twice, as a kernel is compiled, and so come out otherwise on
another processor or GPU; a quotient by a plain number is a product with its reciprocal on a GPU; and a root in fp32 is
the vendor library's on a CPU, which is off by a bit in one of 150 and otherwise on another processor.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.optim.moments import Moment

# Elements that a step works on at a time: on a CPU what stays in its cache, elsewhere what bounds the temporaries.
_PIECE, _PIECE_ON_CPU = 2**22, 2**16


def divide_(tensor: torch.Tensor, by: float) -> torch.Tensor:
    """``tensor / by`` in place, with the same bits on all devices."""
    return tensor.div_(torch.full((), by, dtype=tensor.dtype, device=tensor.device))


def root(tensor: torch.Tensor) -> torch.Tensor:
    """The square root, with the same bits on all devices.

    Half of float64's digits and two: an error of two units there does not reach the last digit of fp32.
    """
    return tensor.double().sqrt().to(tensor.dtype)


class ExactOptimizer(Optimizer):
    """Takes the step of a piece of a parameter at a time, which bounds the temporaries.

    All state is there from the start: a step with zero gradients, by which others create it, would age it.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, and their state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if state := self._initial(group, parameter.detach()):
                self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(group, parameter)
        return loss

    def _step_parameter(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        state = self.state.get(parameter, {})
        if "step" in state:
            state["step"] += 1
        alike = {key: value for key, value in state.items() if key != "step"}
        tensors = [each.detach() for each in (parameter, parameter.grad, *alike.values())]
        for piece, gradient, *values in _pieces(tensors):
            self._step_piece(group, piece, gradient, {**state, **dict(zip(alike, values, strict=True))})

    @abstractmethod
    def _initial(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state before the first step."""

    @abstractmethod
    def _step_piece(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> None:
        """Move a piece of a parameter, and of its state; a step count includes this step."""


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterable[Sequence[torch.Tensor]]:
    """Tensors of one shape, some elements of all at a time."""
    most = _PIECE_ON_CPU if tensors[0].device.type == "cpu" else _PIECE
    if tensors[0].numel() <= most or not all(each.is_contiguous() for each in tensors):
        return [tensors]
    return zip(*(each.view(-1).split(most) for each in tensors), strict=True)


class ExactSGD(ExactOptimizer):
    """SGD with momentum, as DiLoCo's outer step (arXiv 2311.08105, algorithm 1); torch's ``SGD`` but for its rounding.

    ``v = mu v + g``; ``x = x - lr v``, or with Nesterov's momentum ``x = x - lr (g + mu v)``.

    Args:
        params: parameters or groups of them.
        lr: learning rate, at least 0.
        momentum: mu, from 0 to below 1; 0 keeps no state.
        nesterov: Nesterov's momentum.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.0, nesterov: bool = False) -> None:
        if lr < 0:
            raise ValueError(f"lr = {lr}: must be at least 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum}: must be from 0 to below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    def _initial(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}

    def _step_piece(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> None:
        direction = gradient
        if group["momentum"]:
            velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
            direction = (velocity * group["momentum"]).add_(gradient) if group["nesterov"] else velocity
        parameter.sub_(direction * group["lr"])


class FedOpt(ExactOptimizer):
    """The adaptive outer optimizers of arXiv 2003.00295 (algorithm 2).

    ``m = b1 m + (1 - b1) g``; ``v`` follows ``g^2`` in one of three ways; ``x = x - lr m / (sqrt(v) + eps)``, with
    ``v`` starting at ``eps^2``. (The gradient is start minus end, the paper's difference with its sign turned.)

    Args:
        params: parameters or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: adaptivity floor (the paper's tau), above 0.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    def __init__(
        self, params: Iterable, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-3
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr = {lr}: must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas = {betas}: must be two numbers in [0, 1)")
        if eps <= 0:
            raise ValueError(f"eps = {eps}: must be above 0")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def _initial(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.full_like(parameter, group["eps"] ** 2)}

    def _step_piece(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> None:
        beta = group["betas"][0]
        state["exp_avg"].mul_(beta).add_(gradient * (1 - beta))
        self._follow(state["exp_avg_sq"], gradient * gradient, group["betas"][1])
        roots = root(state["exp_avg_sq"]).add_(group["eps"])
        parameter.sub_((state["exp_avg"] / roots).mul_(group["lr"]))

    @abstractmethod
    def _follow(self, second: torch.Tensor, squares: torch.Tensor, beta: float) -> None:
        """Let the second moment follow the squares, which may be overwritten."""


class FedAdam(FedOpt):
    """``v = b2 v + (1 - b2) g^2``."""

    def _follow(self, second: torch.Tensor, squares: torch.Tensor, beta: float) -> None:
        second.mul_(beta).add_(squares.mul_(1 - beta))


class FedAdagrad(FedOpt):
    """``v = v + g^2``."""

    def _follow(self, second: torch.Tensor, squares: torch.Tensor, beta: float) -> None:
        second.add_(squares)


class ExactAdam(FedAdam):
    """torch's ``Adam`` but for its rounding: moments from zero, both corrected of their bias (as in Photon's server)."""

    def _initial(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros(()), **zeros}

    def _step_piece(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> None:
        beta1, beta2 = group["betas"]
        first, second = (Moment(order, beta, True).mass(int(state["step"])) for order, beta in ((1, beta1), (2, beta2)))
        state["exp_avg"].mul_(beta1).add_(gradient * (1 - beta1))
        self._follow(state["exp_avg_sq"], gradient * gradient, beta2)
        roots = divide_(root(state["exp_avg_sq"]), math.sqrt(second)).add_(group["eps"])
        parameter.sub_((state["exp_avg"] / roots).mul_(group["lr"] / first))


class ExactAdagrad(FedAdagrad):
    """torch's ``Adagrad`` but for its rounding: without momentum, the sum of squares from zero."""

    def _initial(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": torch.zeros_like(parameter)}

    def _step_piece(
        self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor]
    ) -> None:
        self._follow(state["sum"], gradient * gradient, 0.0)
        parameter.sub_((gradient / root(state["sum"]).add_(group["eps"])).mul_(group["lr"]))
