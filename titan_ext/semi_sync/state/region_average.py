"""The inner level of a tree of sites: those of a region average their parameters, or the gradients of each step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.state.views import like, local_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionAverage(Apply):
    """The local parameters become the mean over the site's region; what all sites share is left as it is (HierFAVG,
    arXiv 1905.06641).

    With plain SGD, every step, and sites weighted by their tokens, that is one step of the region's whole batch.
    """

    yields_to_all: ClassVar[bool] = True

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The parameters themselves; the other level's rule keeps the global copy."""
        return SyncedState(rule, tensors, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionGradients(Apply):
    """The gradients of a step become the mean over the site's region, weighted by tokens, before they are clipped: data
    parallelism over its sites, with any inner optimizer."""

    takes_gradients: ClassVar[bool] = True

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The gradients of the rule's parameters."""
        return _Gradients(rule, tensors, options)


class _Gradients(SyncedState):
    """Gradients have the shape of their parameters, so that memory and messages are those of parameters.

    Methods are collectives over the site where a gradient is laid out otherwise than its parameter.
    """

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        for part, parameter in self._parts(out):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(local_tensor(_laid_out_as(parameter)))

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        for part, parameter in self._parts(of.mean(total)):
            # A parameter that had no part in the step stays without, or the optimizer would decay it.
            if parameter.grad is not None or part.any():
                parameter.grad = like(parameter, part.to(local_tensor(parameter), copy=True))

    def _parts(self, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, nn.Parameter]]:
        parameters = [self.tensors.view.parameters[name] for name in self.names]
        return zip(self.tensors.split(flat), parameters, strict=True)


def _laid_out_as(parameter: nn.Parameter) -> torch.Tensor:
    """The parameter's gradient, laid out as it is."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient
