"""What the model holds beside trained parameters, for a forward pass reads it: buffers and frozen parameters.

Buffers that a checkpoint keeps (a router's expert bias, running means) change at each site, so they travel with the
parameters and become their mean. Frozen parameters do not change, so they do not travel; they belong to the shared
state all the same: a newcomer gets them, and the checksum tells whether they are equal.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from titan_ext.errors import RunError
from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.rule import PARAMETERS, Apply, SyncRule
from titan_ext.semi_sync.state.synced_parameters import ValuesWithGlobalCopy
from titan_ext.semi_sync.state.synced_state import BindOptions, StateFacts, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.wire.aggregations import Mean
from titan_ext.semi_sync.wire.reductions import AllReduce


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageBuffers(Apply):
    """Buffers become their mean, whatever becomes of the parameters."""

    adds_up: ClassVar[bool] = True
    keeps_late_work: ClassVar[bool] = True

    final: bool = False
    """Whether the method's sites differ until the end."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """Buffers with a global copy."""
        return (FinalBuffers if self.final else Buffers)(rule, tensors, options)


class Buffers(ValuesWithGlobalCopy):
    """Buffers, each by its mean in fp32; their size is not that of an update, so none is an outlier."""

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        if isinstance(rule.wire.aggregation, Mean):
            self.reduction = AllReduce(rule.wire.bucket_elements)


class FinalBuffers(Buffers):
    """Buffers of a method whose sites differ until the end."""

    facts = StateFacts(copies=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepFrozen(Apply):
    """Parameters that are not trained stay as they are."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The parameters themselves."""
        return FrozenParameters(rule, tensors, options)


class FrozenParameters(SyncedState):
    """Parameters that are not trained; never launched."""

    facts = StateFacts(equal_at_all_sites=True)

    def global_values(self) -> list[torch.Tensor]:
        """The parameters themselves."""
        return self.tensors.locals()

    def shared_state(self) -> NamedState:
        """The parameters themselves."""
        return {name: {"value": value} for name, value in zip(self.names, self.tensors.locals(), strict=True)}

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A member's values."""
        self.load(self.shared_state(), state)

    def checkpoint_state(self) -> NamedState:
        """Nothing: the model's own checkpoint holds them."""
        return {}

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing to restore."""

    def check(self) -> None:
        """Make sure that they are frozen still.

        Raises:
            RunError: naming one that is not.
        """
        trained = [name for name in self.names if self.tensors.view.parameters[name].requires_grad]
        if trained:
            raise RunError(
                f"{trained[0]} was frozen when the outer loop was built and is trained now, so it would never be "
                "exchanged: build the outer loop after thawing"
            )


FROZEN = SyncRule(name="frozen", period=1, apply=KeepFrozen())
"""Of every plan, where the model has frozen parameters; it is bound, and never launched."""


def with_buffers(plan: SyncPlan, buffers: Collection[str]) -> SyncPlan:
    """The plan with a rule for buffers beside the parameters' least frequent one, if there are any.

    Args:
        plan: the method's.
        buffers: their names; of all ranks of the site.

    Raises:
        ValueError: what the plan sends is noised, and they would travel as they are.
    """
    if not buffers:
        return plan
    if any(rule.apply.keeps_private for rule in plan.rules):
        raise ValueError(
            f"updates are noised, but the buffer {sorted(buffers)[0]} would travel as it is; leave noise out"
        )
    rules = [rule for rule in plan.rules if rule.state == PARAMETERS and not rule.scope]
    final = [rule for rule in rules if rule.final]
    beside = final[-1] if final else max(reversed(rules or plan.rules), key=lambda rule: rule.period)
    rule = replace(beside, name="buffers", state=PARAMETERS, apply=AverageBuffers(final=bool(final)))
    return replace(plan, rules=(*plan.rules, rule))
