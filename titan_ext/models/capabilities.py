"""What a model can do beside computing logits: its config answers, and nobody asks for its class."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """A model's answers; the defaults are those of a decoder that runs its layers once, in order."""

    iterations: int | None = None
    """How often the body runs at evaluation; None: the model does not iterate, and its forward takes no number."""
    runs_once: bool = True
    """Whether evaluation runs each layer once and adds nothing, as the standard decoder does with these weights."""
    ties: bool = False
    """Whether embedding and head are one matrix."""
    cut: Callable[[Any, Any], list[list[str]]] | None = None
    """Module names of each pipeline stage, given torchtitan's ``ParallelismConfig`` and ``ParallelDims``; None: the
    model can be cut between any two layers."""
    sizes: Callable[[], Mapping[str, Any]] = dict
    """What the model is, in keys of ``[model]``, as far as that is known."""


@runtime_checkable
class Capable(Protocol):
    """A model's config that answers for itself."""

    def capabilities(self) -> Capabilities:
        """The answers."""


@runtime_checkable
class FollowsSteps(Protocol):
    """A model that computes differently from one training step to the next."""

    def set_step(self, step: int) -> None:
        """Tell which training step comes, before it."""


def capabilities(config: Any) -> Capabilities:
    """What a model's config answers; of one that does not, such as torchtitan's own, what its parts show."""
    from titan_ext.models.sizes import sizes_in

    if isinstance(config, Capable):
        return config.capabilities()
    return Capabilities(ties=getattr(config, "enable_weight_tying", False), sizes=partial(sizes_in, config))


def tell_step(parts: Iterable[nn.Module], step: int) -> None:
    """Tell those parts of a model which training step comes that want to know."""
    for part in parts:
        if isinstance(part, FollowsSteps):
            part.set_step(step)
