"""LoRDO's inner optimizer (arXiv 2602.04396): AdamW with low-rank moments and a full-rank quasi-hyperbolic term.

The paper was read in a transcription and its author's public code; where these leave something open, the choice
is named at the line. What is computed on shards is exact: a DTensor takes the steps of the whole matrix.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titan_ext.errors import require
from titan_ext.optim import low_rank_layout as layout
from titan_ext.optim.low_rank_step import Matrix, size, take_step
from titan_ext.optim.moments import Moment, adam_moments
from titan_ext.optim.projection import projection, rotated
from titan_ext.optim.rounding import seed_of, shard_of
from titan_ext.optim.wide import adamw_step, keep_wide, working_dtype

logger = logging.getLogger(__name__)

_BASES = (None, "gradient", "outer")
_LOW_RANK_KEYS = ("basis", "low_exp_avg", "low_exp_avg_sq", "error")


class LowRankAdamW(Optimizer):
    """AdamW in a low-rank basis for hidden matrices, AdamW for embeddings, the head, norms and small matrices.

    With the gradient ``G`` of a matrix, its orthonormal basis ``Q``, the error ``E`` that starts at 0 and n
    steps taken (left projection; the right one is the same of the transpose):
    ``A = G + E``; ``s = Q^T A``; ``E = A - Q s``; ``u = b1 u + (1 - b1) s``; ``v = b2 v + (1 - b2) s^2``;
    ``d = sqrt(v / (1 - b2^n)) + eps``;
    ``W = W (1 - lr wd) - lr [(1 - omega) G / mean(d) + omega Q (u / (1 - b1^n) / d)]``.

    The first basis is of the first gradient that is not zero, unless :meth:`set_basis` was there before.
    With ``basis_from="gradient"`` it is found anew from ``A`` each ``refresh_every`` steps (LoRDO-Local);
    with "outer" it changes by :meth:`set_basis` only, which the outer loop calls on all workers.

    State of a low-rank matrix: ``step``, ``basis`` (zeros until there is one), ``low_exp_avg``, ``low_exp_avg_sq``
    and, with error feedback, ``error``, which is this worker's own and never averaged. They are float32 at
    least. State of the rest: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Args:
        params: parameters, or groups; a group's ``param_names`` (torchtitan gives them) tell what is an embedding.
        lr: learning rate, at least 0; a number or a tensor of one element.
        betas: decay rates of the low-rank moments, each in [0, 1).
        eps: added to the roots, above 0.
        weight_decay: decoupled, of matrices and the rest, at least 0.
        rank: columns of a basis, at least 1; a matrix with a side of no more than it is left to AdamW.
        omega: weight of the low-rank momentum, from 0 to 1; 1 is without the full-rank term, which LoRDO needs
            for the averaged pseudo-gradient to leave the subspace.
        error_feedback: keep what the projection loses and add it to the next gradient; takes a matrix's size.
        basis_from: "gradient" or "outer"; None is "outer" once an outer loop gives bases, and "gradient" without one.
        refresh_every: steps between bases of "gradient", at least 1.
        power_iterations: subspace iterations for a basis, 0 for exact singular vectors.
        adamw_lr: learning rate of the rest relative to ``lr``.
        adamw_betas: decay rates of the rest, which has no full-rank term to make up for a slow momentum.
        adamw_names: parameters with one of these words in their name are left to AdamW, matrices or not.

    Raises:
        ValueError: a hyper-parameter is outside its range.
    """

    own_states = ("basis", "error")
    """What no mean over workers may replace."""

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 8e-3,
        betas: tuple[float, float] = (0.999, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 32,
        omega: float = 0.97,
        error_feedback: bool = True,
        basis_from: str | None = None,
        refresh_every: int = 32,
        power_iterations: int = 0,
        adamw_lr: float = 1.0,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_names: Sequence[str] = ("embed", "output", "lm_head"),
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "omega": omega,
            "error_feedback": error_feedback,
            "basis_from": basis_from,
            "refresh_every": refresh_every,
            "power_iterations": power_iterations,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_names": adamw_names,
        }
        self._based: set[torch.Tensor] = set()
        super().__init__(params, defaults)
        full = self.full_rank_names()
        total = sum(len(group["params"]) for group in self.param_groups)
        names = ", ".join(full) or "none"
        logger.info("LowRankAdamW: %d parameters are low rank; AdamW has %s", total - len(full), names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._based = set()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own values of any setting.

        Raises:
            ValueError: a hyper-parameter is outside its range; the group is not added.
        """
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    rounds_at_random = True
    """Whether narrow parameters are rounded so, and their moments kept in fp32."""

    @staticmethod
    def moments(settings: Mapping[str, Any], name: str, shape: Sequence[int]) -> dict[str, Moment]:
        """See ``titan_ext.optim.moments``."""
        if not _is_low_rank(name, shape, settings):
            return adam_moments(settings["adamw_betas"])
        return {f"low_{key}": moment for key, moment in adam_moments(settings["betas"]).items()}

    @staticmethod
    def state_shapes(
        settings: Mapping[str, Any], name: str, whole: torch.Size, held: torch.Size
    ) -> dict[str, torch.Size]:
        """See ``titan_ext.optim.moments``."""
        if not _is_low_rank(name, whole, settings):
            return dict.fromkeys(adam_moments(settings["adamw_betas"]), held)
        rank = settings["rank"]
        moment = torch.Size([held[0], rank] if whole[0] >= whole[1] else [rank, held[1]])
        shapes = {"basis": torch.Size([min(held), rank]), "low_exp_avg": moment, "low_exp_avg_sq": moment}
        return shapes | ({"error": held} if settings["error_feedback"] else {})

    def full_rank_names(self) -> list[str]:
        """Names of the parameters left to AdamW; their places where a group has no names."""
        return [name for name, parameter, group in self._named() if not _is_low_rank(name, parameter.shape, group)]

    def low_rank_parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that have a basis, by name: those of :meth:`set_basis`."""
        return {
            name: parameter for name, parameter, group in self._named() if _is_low_rank(name, parameter.shape, group)
        }

    @torch.no_grad()
    def set_basis(self, parameter: torch.Tensor, basis: torch.Tensor) -> bool:
        """Put a low-rank parameter's moments into another basis; its error stays. Returns whether the basis changed.

        All ranks of a DTensor's mesh must call this, with the same basis.

        Args:
            parameter: one of :meth:`low_rank_parameters`.
            basis: ``[min(rows, columns), rank]``, whole (or a DTensor), orthonormal columns: :func:`projection`'s.

        Raises:
            ValueError: the parameter has no basis, or ``basis`` is not one for it.
        """
        for name, each, group in self._named():
            if each is parameter and _is_low_rank(name, parameter.shape, group):
                break
        else:
            raise ValueError(f"parameter of shape {[*parameter.shape]}: must be one of low_rank_parameters()")
        whole = basis.full_tensor() if isinstance(basis, DTensor) else basis
        whole = whole.detach().to(layout.local(parameter).device, working_dtype(parameter))
        shape = (min(parameter.shape), group["rank"])
        if whole.shape != shape:
            raise ValueError(f"basis of {name} has shape {[*whole.shape]}: must be {[*shape]}")
        skew = float((whole.mT @ whole - torch.eye(group["rank"]).to(whole)).abs().max())
        if not skew < 1e-3:
            raise ValueError(f"basis of {name} is off orthonormal by {skew:.2g}: must be below 1e-3")
        return self._change_basis(group, parameter, whole)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for place, group in enumerate(self.param_groups):
            graded = [(name, each) for name, each in _names(place, group) if each.grad is not None]
            if any(each.grad.is_sparse for _, each in graded):
                raise RuntimeError("LowRankAdamW does not support sparse gradients")
            matrices = [each for name, each in graded if _is_low_rank(name, each.shape, group)]
            if matrices:
                take_step(group, [self._begin(group, each, number) for number, each in enumerate(matrices)])
            rest = [each for name, each in graded if not _is_low_rank(name, each.shape, group)]
            adamw_step(
                self.state,
                rest,
                lr=float(group["lr"]) * group["adamw_lr"],
                betas=group["adamw_betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ``state_dict``; moments keep their dtype, whatever the parameter's."""
        super().load_state_dict(state_dict)
        keep_wide(self, state_dict)

    def _named(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        for place, group in enumerate(self.param_groups):
            yield from ((name, parameter, group) for name, parameter in _names(place, group))

    def _state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
        state, rank = self.state[parameter], group["rank"]
        if not state:
            state["step"] = torch.zeros(())
            state["basis"] = layout.zero_basis(parameter, rank)
            state["low_exp_avg"] = layout.zero_moment(parameter, rank)
            state["low_exp_avg_sq"] = layout.zero_moment(parameter, rank)
        if group["error_feedback"] and "error" not in state:
            state["error"] = torch.zeros_like(parameter, dtype=working_dtype(parameter))
        return state

    def _begin(self, group: dict[str, Any], parameter: torch.Tensor, number: int) -> Matrix:
        """Count the step, add the gradient to the error, and see to the basis."""
        state = self._state(group, parameter)
        taken = int(state["step"])
        state["step"] += 1
        gradient = layout.local_gradient(parameter).to(working_dtype(parameter))
        signal = layout.local(state["error"]).add_(gradient) if group["error_feedback"] else gradient
        due = group["basis_from"] != "outer" and taken > 0 and taken % group["refresh_every"] == 0
        # Neither a zero nor a ruined gradient tells directions; materialising the state steps with zeros.
        if (due or not self._has_basis(parameter)) and 0 < size(parameter, signal) < math.inf:
            whole = projection(layout.like_matrix(parameter, signal), group["rank"], group["power_iterations"])
            self._change_basis(group, parameter, whole, taken)
        basis, first, second = (layout.local(state[key]) for key in _LOW_RANK_KEYS[:3])
        seed = seed_of(taken, number, *shard_of(parameter))
        dim = layout.projected_dim(parameter.shape)
        return Matrix(parameter, gradient, signal, basis, first, second, taken + 1, dim, seed)

    def _has_basis(self, parameter: torch.Tensor) -> bool:
        """Whether the basis is not zero; looked at, which waits for a GPU, until it is so after a step."""
        if parameter in self._based and self.state[parameter]["step"] > 1:
            return True
        if bool(layout.whole(self.state[parameter]["basis"]).any()):
            self._based.add(parameter)
        else:
            self._based.discard(parameter)
        return parameter in self._based

    def _change_basis(
        self, group: dict[str, Any], parameter: torch.Tensor, whole: torch.Tensor, taken: int | None = None
    ) -> bool:
        state = self._state(group, parameter)
        taken = int(state["step"]) if taken is None else taken
        old = layout.whole(state["basis"])
        # Compared and multiplied whole: ranks that judged by their shards could disagree.
        if torch.equal(old, whole):
            return False
        if taken:
            first, second = (layout.local(state[key]) for key in ("low_exp_avg", "low_exp_avg_sq"))
            beta1, beta2 = group["betas"]
            corrections = (1 - beta1**taken, 1 - beta2**taken)
            turned = rotated(first, second, whole.mT @ old, layout.projected_dim(parameter.shape), corrections)
            torch._foreach_copy_([first, second], list(turned))
        layout.write_whole(state["basis"], whole)
        return True


def _names(place: int, group: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    unnamed = [f"#{place}.{index}" for index in range(len(group["params"]))]
    return zip(group.get("param_names") or unnamed, group["params"], strict=True)


def _is_low_rank(name: str, shape: Sequence[int], settings: Mapping[str, Any]) -> bool:
    if len(shape) != 2 or min(shape) <= settings["rank"]:
        return False
    return not any(word in name for word in settings["adamw_names"])


def _check(group: dict[str, Any]) -> None:
    require(torch.as_tensor(group["lr"]).numel() == 1 and group["lr"] >= 0, "lr", group["lr"], "one number, at least 0")
    for key in ("weight_decay", "adamw_lr"):
        require(group[key] >= 0, key, group[key], "at least 0")
    require(group["eps"] > 0, "eps", group["eps"], "above 0")
    for key in ("betas", "adamw_betas"):
        decays = isinstance(group[key], Sequence) and len(group[key]) == 2 and all(0 <= each < 1 for each in group[key])
        require(decays, key, group[key], "two numbers in [0, 1)")
    require(0 <= group["omega"] <= 1, "omega", group["omega"], "from 0 to 1")
    for key, least in (("rank", 1), ("refresh_every", 1), ("power_iterations", 0)):
        require(type(group[key]) is int and group[key] >= least, key, group[key], f"a whole number, at least {least}")
    require(isinstance(group["error_feedback"], bool), "error_feedback", group["error_feedback"], "True or False")
    require(group["basis_from"] in _BASES, "basis_from", group["basis_from"], " or ".join(map(repr, _BASES[1:])))
    names = group["adamw_names"]
    words = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(each, str) for each in names)
    require(words, "adamw_names", group["adamw_names"], "a list of words")
