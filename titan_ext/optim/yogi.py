"""Yogi without bias correction, the adaptive step of FedYogi (arXiv 2003.00295, algorithm 2)."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer


class Yogi(Optimizer):
    """Like Adam, but the second moment moves by an amount that does not depend on its own size.

    ``m = b1 m + (1 - b1) g``; ``v = v - (1 - b2) g^2 sign(v - g^2)``; ``x = x - lr m / (sqrt(v) + eps)``,
    with ``v`` starting at ``eps^2``.

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict, parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.full_like(parameter, group["eps"] ** 2)
        beta1, beta2 = group["betas"]
        gradients = [each.grad for each in parameters]
        first = [self.state[each]["exp_avg"] for each in parameters]
        second = [self.state[each]["exp_avg_sq"] for each in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        squares = torch._foreach_mul(gradients, gradients)
        signs = torch._foreach_sign(torch._foreach_sub(second, squares))
        torch._foreach_addcmul_(second, squares, signs, value=beta2 - 1)
        roots = torch._foreach_add(torch._foreach_sqrt(second), group["eps"])
        torch._foreach_addcdiv_(parameters, first, roots, value=-group["lr"])
