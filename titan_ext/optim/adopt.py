"""ADOPT (arXiv 2411.02853), clipped: the inner optimizer of DES-LOC-ADOPT (arXiv 2505.22549, algorithm 3)."""

from collections.abc import Iterable
from typing import Any

import torch

from titan_ext.errors import require
from titan_ext.optim.quasi_hyperbolic import QHADOPT


class ADOPT(QHADOPT):
    """Adam whose second moment does not know the gradient that it divides, so that any beta2 converges.

    The first step only sets ``v = g^2``. With n steps taken: ``c = clamp(g / max(sqrt(v), eps), -n^e, n^e)``;
    ``m = b1 m + (1 - b1) c``; ``x = x - lr m``; then ``v = b2 v + (1 - b2) g^2``. It is :class:`QHADOPT` with
    all the weight on one momentum, which is called ``exp_avg`` here.

    Args:
        params: parameters or groups of them.
        lr: learning rate, at least 0; a number or a tensor of one element.
        betas: decay rates of the two moments, each in [0, 1); the default is DES-LOC's.
        eps: least divisor of a gradient, above 0.
        clip_exponent: ``e`` above, at least 0; ``inf`` does not clip.
        weight_decay: decoupled: each step but the first multiplies the parameters by ``1 - lr * weight_decay``.
        state_dtype: dtype of the moments, as for :class:`QHADOPT`; the parameters' own if None.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    _momentum_key = "exp_avg"

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.9999),
        eps: float = 1e-6,
        clip_exponent: float = 0.25,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, lr, betas, (1.0,), eps, clip_exponent, weight_decay, state_dtype)

    def _check(self, group: dict[str, Any]) -> None:
        require(tuple(group["omegas"]) == (1.0,), "omegas", group["omegas"], "left out: they are QHADOPT's")
        super()._check(group)
