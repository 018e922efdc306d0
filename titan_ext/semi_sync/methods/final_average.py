"""The last mean of methods whose sites differ until the end."""

from dataclasses import dataclass

import torch

from titan_ext.semi_sync.methods.registry import MethodContext
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.synced_state import BindOptions, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.wire.reductions import AllReduce


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalAverage(Apply):
    """The mean of the sites' own parameters becomes the model of all."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The parameters, without a copy."""
        return FinalParameters(rule, tensors, options)


class FinalParameters(SyncedState):
    """Parameters that travel in fp32: no later round would make up for a loss."""

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        self.reduction = AllReduce(rule.wire.bucket_elements)

    def global_values(self) -> list[torch.Tensor]:
        """The local parameters."""
        return self.tensors.locals()


def final_rules(context: MethodContext) -> list[SyncRule]:
    """One for each fragment."""
    return [
        SyncRule(name="final", fragment=fragment, period=1, final=True, wire=context.wire, apply=FinalAverage())
        for fragment in range(context.num_fragments)
    ]
