"""Which states an inner optimizer will keep of a parameter, and in what shape, before there is any."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from titan_ext.config.cost.shapes import parameter_shapes
from titan_ext.config.optimizer import hyper_parameters
from titan_ext.optim.moments import Moment, moments
from titan_ext.semi_sync.plan.plan import PARAMETERS


class InnerStates:
    """The states that ``[optimizer]`` of a configuration comes to.

    Args:
        config: the ``OptimizersContainer.Config``.
    """

    def __init__(self, config: Any) -> None:
        self._resolve = config._owner._resolve_optimizer_factory
        self._groups = [
            (group, (hyper_parameters(config, group.optimizer_name) or {}) | group.optimizer_kwargs)
            for group in config.param_groups
        ]

    def shape(self, state: str, name: str, whole: torch.Size, held: torch.Size) -> torch.Size | None:
        """Shape of a state on a rank; None if the parameter has no such state.

        Args:
            state: ``params``, a state's key, or several with ``|`` between them.
            name: the parameter.
            whole: its shape.
            held: what of it the rank holds.
        """
        if state == PARAMETERS:
            return held
        found = self._group(name)
        if found is None:
            return None
        group, chosen = found
        shapes = _states(group.optimizer_name, chosen, name, whole, held)
        return next((shapes[key] for key in state.split("|") if key in shapes), None)

    def moments(self, name: str, whole: torch.Size) -> dict[str, Moment]:
        """The moments of a parameter of this name and shape."""
        found = self._group(name)
        return moments(self._resolve(found[0].optimizer_name), found[1], name, whole) if found else {}

    def keys(self, name: str, whole: torch.Size) -> list[str]:
        """Keys of the states of a parameter of this name and shape that workers may share."""
        found = self._group(name)
        own = getattr(self._resolve(found[0].optimizer_name), "own_states", ()) if found else ()
        states = _states(found[0].optimizer_name, found[1], name, whole, whole) if found else {}
        return [key for key in states if key not in own]

    def _group(self, name: str) -> tuple[Any, dict[str, Any]] | None:
        return next((each for each in self._groups if re.search(each[0].pattern, name)), None)


def moments_by_size(config: Any) -> list[tuple[int, dict[str, Moment]]]:
    """Elements and moments of every parameter of a site's configuration."""
    states = InnerStates(config.optimizer)
    return [(shape.numel(), states.moments(name, shape)) for name, shape in parameter_shapes(config).items()]


def _states(
    optimizer: str, chosen: Mapping[str, Any], name: str, whole: torch.Size, held: torch.Size
) -> dict[str, torch.Size]:
    adamw = {"exp_avg": held, "exp_avg_sq": held} | ({"max_exp_avg_sq": held} if chosen.get("amsgrad") else {})
    left_alone = any(word in name for word in chosen.get("adamw_names", ()))
    if optimizer == "SGD":
        return {"momentum_buffer": held} if chosen.get("momentum") else {}
    if optimizer == "DeMo":
        return {"momentum": held}
    if optimizer == "Muon":
        return {"momentum_buffer": held} if len(whole) == 2 and not left_alone else adamw
    if optimizer == "LowRankAdamW":
        rank = chosen["rank"]
        if len(whole) != 2 or min(whole) <= rank or left_alone:
            return adamw
        moment = torch.Size([held[0], rank] if whole[0] >= whole[1] else [rank, held[1]])
        basis = {} if chosen["basis_from"] == "gradient" else {"basis": torch.Size([min(held), rank])}
        return {"low_exp_avg": moment, "low_exp_avg_sq": moment} | basis
    if "omegas" in chosen:
        momenta = {f"exp_avg_{place}": held for place in range(len(chosen["omegas"]))}
        return momenta if optimizer == "QHSGDM" else momenta | {"exp_avg_sq": held}
    return adamw
