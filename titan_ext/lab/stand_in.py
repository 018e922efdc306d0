"""What trains at the sites of a rehearsal: a model with the names of the file's parameters, and few elements."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from titan_ext.config.model import parameter_shapes
from titan_ext.errors import UserError
from titan_ext.semi_sync.wire.codecs import CODECS

_SMALL = 2**19
"""Elements up to which a model is its own stand-in."""
_FEWEST, _MOST = 2**16, 2**20
"""Elements of the stand-in of a larger one: many sites' models, optimizers and buffers fit into a few megabytes."""


class StandIn(nn.Module):
    """Parameters by name and shape, all zero; a step moves them towards targets of the site's own.

    Args:
        shapes: by dotted name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(last, nn.Parameter(torch.zeros(shape)))

    def pull(self, random: torch.Generator, target: float) -> None:
        """Write the gradient of ``(parameter - target)**2 / 2``, with noise, into every parameter."""
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.grad = parameter.detach() - target + noise


class Trainee(Protocol):
    """What trains at a site, from one of its starts to its end."""

    model: nn.Module
    """Its parameters have the names of the file's."""
    scale: float
    """How many elements of the file's model one of its stands for."""
    at_every_step: bool
    """Whether each inner step counts, or only the last one before a round."""

    @property
    def rate(self) -> float:
        """Part of the configured learning rate by which the next inner step goes; 0: it changes nothing."""

    def compute_gradients(self) -> None:
        """Write those of the next inner step."""


class StandInTrainee:
    """A stand-in that is pulled towards a target of the site's own.

    Args:
        config: the site's ``Trainer.Config``.
        site: its place among the sites.
        seed: of the rehearsal.
        shrinking: how many times fewer elements it has than the model.

    Raises:
        UserError: what the configuration exchanges does not shrink with the model.
    """

    at_every_step = False
    rate = 1.0

    def __init__(self, config: Any, site: int, seed: int, shrinking: float) -> None:
        shapes, self.scale = shrunk_shapes(config, shrinking)
        self.model: nn.Module = StandIn(shapes)
        self._noise = torch.Generator().manual_seed(1000 * seed + site)
        self._target = 1.0 + 0.1 * site

    def compute_gradients(self) -> None:
        """See ``StandIn.pull``."""
        assert isinstance(self.model, StandIn)
        self.model.pull(self._noise, self._target)


@dataclass(frozen=True, slots=True)
class Shrinking:
    """How a stand-in is made of a model, so that a round takes as many messages as the model's."""

    factor: float
    """How many times fewer elements it has."""
    bucket_mib: float
    """``semi_sync.bucket_mib`` of its outer loop."""


def shrinking(site: Any) -> Shrinking:
    """How the model of a ``Site`` shrinks, whose ranks become one."""
    outer = site.config.semi_sync
    whole = sum(shape.numel() for shape in parameter_shapes(site.config).values())
    at_once = 1 if outer.pairing == "leader" else site.layout.ranks
    buckets = math.ceil(4 * whole / at_once / (outer.bucket_mib * 2**20))
    codec = CODECS.get(outer.codec)
    # A bucket has at least one block for each message that it is cut into.
    least = buckets * codec.granularity * (1 if codec.sparse else site.count)
    elements = whole if whole <= _SMALL else min(max(_FEWEST, least), _MOST)
    return Shrinking(whole / elements, 4 * elements / buckets / 2**20)


def shrunk_shapes(config: Any, factor: float) -> tuple[dict[str, torch.Size], float]:
    """Shapes of the stand-in, and how many elements of the model one of them stands for.

    Args:
        config: the ``Trainer.Config``.
        factor: how many times fewer elements it is to have.

    Raises:
        UserError: what the configuration exchanges does not shrink with the model.
    """
    ranks = [group.optimizer_kwargs.get("rank") for group in config.optimizer.param_groups]
    if factor != 1.0 and (any(ranks) or config.semi_sync.method == "demo"):
        raise UserError(
            f'optimizer.name = "{config.optimizer.param_groups[0].optimizer_name}": the states that it exchanges do not '
            f"shrink with the model; rehearse it with a model of at most {_SMALL:,} parameters, such as --model.flavor tiny"
        )
    shapes = parameter_shapes(config)
    small = {name: _shrink(shape, factor) for name, shape in shapes.items()}
    whole = sum(shape.numel() for shape in shapes.values())
    return small, whole / sum(shape.numel() for shape in small.values())


def _shrink(shape: torch.Size, factor: float) -> torch.Size:
    """About ``factor`` times fewer elements, in as many dimensions."""
    if factor == 1.0:
        return shape
    if len(shape) < 2:
        return torch.Size([max(1, round(each / factor)) for each in shape])
    columns = max(1, round(shape[-1] / math.sqrt(factor)))
    rows = max(1, round(shape.numel() / factor / columns))
    return torch.Size([1] * (len(shape) - 2) + [rows, columns])
