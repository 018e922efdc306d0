"""Muon, MuLoCo's inner optimizer (arXiv 2505.23725): orthonormalised momentum for matrices, AdamW for the rest."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from titan_ext.errors import InvalidValue
from titan_ext.optim.moments import Moment, adam_moments
from titan_ext.optim.shards import local
from titan_ext.optim.wide import adamw_step, keep_wide, store, widened, working_dtype

# One row of coefficients for each iteration; the singular values of the result lie in [0.97, 1.15]
# where the input's are at least 0.003 of its Frobenius norm.
_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthonormalized(matrix: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five Newton-Schulz iterations.

    Args:
        matrix: ``[rows, columns]``, whole.
        dtype: what the iterations compute in.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """Muon for hidden matrices, AdamW for embeddings, the head, norms and biases.

    ``m = mu m + g``; ``x = x (1 - lr wd) - lr sqrt(rows / columns) orthonormalized(m)``. A sharded
    momentum is made whole for the iterations, so the step does not depend on how a matrix is cut.

    Args:
        params: parameters, or groups; a group's ``param_names`` (torchtitan gives them) tell what is an embedding.
        lr: learning rate of the matrices, at least 0.
        momentum: mu, from 0 to below 1.
        weight_decay: decoupled, of matrices and the rest, at least 0.
        adamw_lr: learning rate of the rest relative to ``lr``, so that one schedule serves both.
        betas: AdamW's.
        eps: AdamW's.
        adamw_names: parameters with one of these words in their name are left to AdamW, matrices or not.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adamw_lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_names: Sequence[str] = ("embed", "output", "lm_head"),
    ) -> None:
        if lr < 0:
            raise InvalidValue("lr", lr, "must be at least 0")
        if not 0 <= momentum < 1:
            raise InvalidValue("momentum", momentum, "must be from 0 to below 1")
        if weight_decay < 0:
            raise InvalidValue("weight_decay", weight_decay, "must be at least 0")
        if adamw_lr < 0:
            raise InvalidValue("adamw_lr", adamw_lr, "must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise InvalidValue("betas", betas, "must be two numbers in [0, 1)")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adamw_lr": adamw_lr,
            "betas": tuple(betas),
            "eps": eps,
            "adamw_names": tuple(adamw_names),
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            with_gradient = [(p, name) for p, name in zip(group["params"], names, strict=True) if p.grad is not None]
            matrices = [p for p, name in with_gradient if _is_matrix(p.shape, name, group)]
            for place, parameter in enumerate(matrices):
                self._step_matrix(parameter, group, place)
            taken = {id(each) for each in matrices}
            adamw_step(
                self.state,
                [p for p, _ in with_gradient if id(p) not in taken],
                lr=group["lr"] * group["adamw_lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ``state_dict``; moments keep their dtype, whatever the parameter's."""
        super().load_state_dict(state_dict)
        keep_wide(self, state_dict)

    rounds_at_random = True
    """Whether narrow parameters are rounded so, and their moments kept in fp32."""

    @staticmethod
    def moments(settings: Mapping[str, Any], name: str, shape: Sequence[int]) -> dict[str, Moment]:
        """See ``titan_ext.optim.moments``."""
        if _is_matrix(shape, name, settings):
            return {"momentum_buffer": Moment(1, settings["momentum"])}
        return adam_moments(settings["betas"])

    def _step_matrix(self, parameter: torch.Tensor, group: dict, place: int) -> None:
        state, dtype = self.state[parameter], working_dtype(parameter)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=dtype)
            if dtype != parameter.dtype:
                state["step"] = torch.zeros(())  # whose noise rounds the parameter
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad.to(dtype))
        rows, columns = parameter.shape
        worked = widened(parameter)
        worked.mul_(1 - group["lr"] * group["weight_decay"])
        worked.sub_(local(_orthonormalized_whole(momentum)) * (group["lr"] * (rows / columns) ** 0.5))
        if worked.dtype != parameter.dtype:
            state["step"] += 1
            store(parameter, worked, int(state["step"]), place)


def _is_matrix(shape: Sequence[int], name: str, settings: Mapping[str, Any]) -> bool:
    return len(shape) == 2 and not any(word in name for word in settings["adamw_names"])


def _orthonormalized_whole(momentum: torch.Tensor) -> torch.Tensor:
    """``orthonormalized`` of the whole matrix, cut as ``momentum`` is."""
    if not isinstance(momentum, DTensor):
        return orthonormalized(momentum)
    mesh = momentum.device_mesh
    whole = DTensor.from_local(
        orthonormalized(momentum.full_tensor()), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return whole.redistribute(mesh, momentum.placements)
