"""Quasi-hyperbolic optimizers with one or many first momenta: the inner optimizers of MT-DAO (arXiv 2510.05361).

Each step mixes the gradient with momenta of several time scales; a slow momentum carries the direction
that the sites share through a whole round of local steps, the gradient keeps the update quick.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from titan_ext.optim.momenta import Bucket, MomentumOptimizer

_Tensors = list[torch.Tensor] | tuple[torch.Tensor, ...]


class _QuasiHyperbolic(MomentumOptimizer):
    """The mixed update, which all share."""

    def _move(
        self,
        group: dict[str, Any],
        bucket: Bucket,
        signal: _Tensors,
        scales: Iterable[float],
        denominators: _Tensors | None = None,
    ) -> None:
        """Average ``signal`` into the momenta, then move the parameters along the mix of it and them.

        ``u_j = b_j u_j + (1 - b_j) s``; ``x = x - lr [(1 - sum w_j) s c_0 + sum w_j u_j c_j] / d``, with the
        corrections ``c`` in ``scales`` and ``d`` 1 without ``denominators``.
        """
        lr, omegas = float(group["lr"]), group["omegas"]
        if group["weight_decay"]:
            torch._foreach_mul_(bucket.parameters, 1 - lr * group["weight_decay"])
        for momentum, beta in zip(bucket.momenta, group["betas"], strict=False):
            torch._foreach_lerp_(momentum, signal, 1 - beta)
        weights = [max(0.0, 1 - math.fsum(omegas)), *omegas]
        for weight, scale, terms in zip(weights, scales, [signal, *bucket.momenta], strict=True):
            if not weight:
                continue
            if denominators is None:
                torch._foreach_add_(bucket.parameters, terms, alpha=-lr * weight * scale)
            else:
                torch._foreach_addcdiv_(bucket.parameters, terms, denominators, value=-lr * weight * scale)


class QHSGDM(_QuasiHyperbolic):
    """SGD along a mix of the gradient and its momenta (MT-DAO-SGDM, algorithm 3).

    ``u_j = b_j u_j + (1 - b_j) g``; ``x = x - lr [(1 - sum w_j) g + sum w_j u_j]``. The momenta are averages:
    torch's ``SGD(lr (1 - b), momentum=b)`` is ``omegas=(1,)``, its Nesterov form ``omegas=(b,)``.

    Settings are read at each step, so a schedule may change ``betas`` and ``omegas`` of a group, not their number.

    Args:
        params: parameters or groups of them.
        lr: learning rate, at least 0; a number or a tensor of one element.
        betas: decay rate of each momentum, in [0, 1).
        omegas: weight of each momentum, at least 0, together at most 1; the gradient has the rest.
        weight_decay: decoupled: each step first multiplies the parameters by ``1 - lr * weight_decay``.
        state_dtype: dtype of the moments; the parameters' own if None.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    _has_squares = False

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-2,
        betas: Sequence[float] = (0.999,),
        omegas: Sequence[float] = (0.95,),
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "omegas": omegas}
        super().__init__(params, settings | {"weight_decay": weight_decay, "state_dtype": state_dtype})

    def _update(self, group: dict[str, Any], bucket: Bucket) -> int:
        self._move(group, bucket, bucket.gradients, [1.0] * (1 + len(group["omegas"])))
        return 1


class QHAdamW(_QuasiHyperbolic):
    """Adam with decoupled weight decay along a mix of the gradient and its momenta (MT-DAO-Adam, algorithm 1).

    ``u_j = b_j u_j + (1 - b_j) g``; ``v = b v + (1 - b) g^2``;
    ``x = x - lr [(1 - sum w_j) g + sum w_j u_j / (1 - b_j^n)] / (sqrt(v / (1 - b^n)) + eps)`` at step n = 1, 2, ….
    The bias correction is that of the author's code. ``omegas=(1,)`` is torch's AdamW.

    Args:
        params, lr, omegas, weight_decay, state_dtype: as for :class:`QHSGDM`.
        betas: decay rate of each momentum, then that of the second moment, in [0, 1).
        eps: added to the root, above 0.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    _corrects_bias = True

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: Sequence[float] = (0.999, 0.999),
        omegas: Sequence[float] = (0.95,),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "omegas": omegas, "eps": eps}
        super().__init__(params, settings | {"weight_decay": weight_decay, "state_dtype": state_dtype})

    def _update(self, group: dict[str, Any], bucket: Bucket) -> int:
        *betas, last = group["betas"]
        steps = bucket.step + 1
        _track_squares(bucket, last)
        # g / (sqrt(v) / root + eps) is root g / (sqrt(v) + root eps): one pass fewer over memory.
        root = math.sqrt(1 - last**steps)
        denominators = torch._foreach_sqrt(bucket.squares)
        torch._foreach_add_(denominators, root * group["eps"])
        scales = [root, *(root / (1 - beta**steps) for beta in betas)]
        self._move(group, bucket, bucket.gradients, scales, denominators)
        return 1


class QHADOPT(_QuasiHyperbolic):
    """ADOPT along a mix of the normalised gradient and its momenta (MT-DAO-ADOPT, algorithm 2).

    The first step only sets ``v = g^2``. With n steps taken:
    ``c = clamp(g / max(sqrt(v), eps), -n^e, n^e)``; ``u_j = b_j u_j + (1 - b_j) c``;
    ``x = x - lr [(1 - sum w_j) c + sum w_j u_j]``; then ``v = b v + (1 - b) g^2``. There is no bias correction.

    A first step with learning rate 0 does not count: torch and torchtitan create state by such a step
    with zero gradients, and ``v = 0`` must not be taken for the size of a gradient.

    Args:
        params, lr, omegas, weight_decay, state_dtype: as for :class:`QHSGDM`.
        betas: decay rate of each momentum, then that of the second moment, in [0, 1).
        eps: least divisor of a gradient, above 0.
        clip_exponent: ``e`` above, at least 0; ``inf`` does not clip.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: Sequence[float] = (0.999, 0.9999),
        omegas: Sequence[float] = (0.98,),
        eps: float = 1e-6,
        clip_exponent: float = 0.25,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "omegas": omegas, "eps": eps, "clip_exponent": clip_exponent}
        super().__init__(params, settings | {"weight_decay": weight_decay, "state_dtype": state_dtype})

    def _update(self, group: dict[str, Any], bucket: Bucket) -> int:
        if bucket.step == 0:
            torch._foreach_copy_(bucket.squares, torch._foreach_mul(bucket.gradients, bucket.gradients))
            return int(float(group["lr"]) > 0)
        # In place from the roots on: one temporary.
        signal = torch._foreach_sqrt(bucket.squares)
        torch._foreach_clamp_min_(signal, group["eps"])
        torch._foreach_reciprocal_(signal)
        torch._foreach_mul_(signal, bucket.gradients)
        if math.isfinite(group["clip_exponent"]):
            bound = bucket.step ** group["clip_exponent"]
            torch._foreach_clamp_min_(signal, -bound)
            torch._foreach_clamp_max_(signal, bound)
        self._move(group, bucket, signal, [1.0] * (1 + len(group["omegas"])))
        _track_squares(bucket, group["betas"][-1])
        return 1


def _track_squares(bucket: Bucket, beta: float) -> None:
    torch._foreach_mul_(bucket.squares, beta)
    torch._foreach_addcmul_(bucket.squares, bucket.gradients, bucket.gradients, value=1 - beta)
