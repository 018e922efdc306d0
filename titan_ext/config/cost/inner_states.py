"""Which states an inner optimizer will keep of a parameter, and in what shape, before there is any."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from titan_ext.config.model import parameter_shapes
from titan_ext.config.optimizer import hyper_parameters
from titan_ext.optim.moments import Moment, moments, state_shapes


class InnerStates:
    """The states that ``[optimizer]`` of a configuration comes to.

    Args:
        config: the ``OptimizersContainer.Config``.
    """

    def __init__(self, config: Any) -> None:
        resolve = config._owner._resolve_optimizer_factory
        self._groups = []
        for group in config.param_groups:
            kind, defaults = resolve(group.optimizer_name), hyper_parameters(config, group.optimizer_name) or {}
            self._groups.append((group.pattern, kind, defaults | group.optimizer_kwargs))

    @property
    def hyper_parameters(self) -> list[dict[str, Any]]:
        """Of each group."""
        return [settings for _, _, settings in self._groups]

    def shapes(self, name: str, whole: torch.Size, held: torch.Size) -> dict[str, torch.Size]:
        """By key the shapes of a parameter's states on a rank.

        Args:
            name: of the parameter.
            whole: its shape.
            held: what of it the rank holds.
        """
        kind, settings = self.optimizer(name)
        return {} if kind is None else state_shapes(kind, settings, name, whole, held)

    def kept(self, shapes: Mapping[str, torch.Size]) -> dict[str, set[str]]:
        """By parameter the keys of its states; ``shapes`` are those of whole parameters, by name."""
        return {name: {*self.shapes(name, shape, shape)} for name, shape in shapes.items()}

    def own_keys(self) -> set[str]:
        """Keys of states that no mean over sites may replace."""
        return {key for _, kind, _ in self._groups for key in getattr(kind, "own_states", ())}

    def moments(self, name: str, whole: torch.Size) -> dict[str, Moment]:
        """The moments of a parameter of this name and shape."""
        kind, settings = self.optimizer(name)
        return {} if kind is None else moments(kind, settings, name, whole)

    def optimizer(self, name: str) -> tuple[Any, dict[str, Any]]:
        """What builds the optimizer of a parameter, and the hyper-parameters of its group; None where it has none."""
        found = (each[1:] for each in self._groups if re.search(each[0], name))
        return next(found, (None, {}))


def moments_by_size(config: Any) -> list[tuple[int, dict[str, Moment]]]:
    """Elements and moments of every parameter of a site's configuration."""
    states = InnerStates(config.optimizer)
    return [(shape.numel(), states.moments(name, shape)) for name, shape in parameter_shapes(config).items()]
