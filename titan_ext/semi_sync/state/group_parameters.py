"""Parameters that only the sites of one label average: each group of sites has global values of its own.

A general model with a model for each group beside it (arXiv 2305.12134, whose groups are modalities) is such a scope, and so
are embeddings that the sites of one language share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.semi_sync.plan.rule import PARAMETERS, Apply, SyncRule
from titan_ext.semi_sync.state.synced_parameters import SyncedParameters, ValuesWithGlobalCopy
from titan_ext.semi_sync.state.synced_state import BindOptions, StateFacts, SyncedState, TakenFromPeers
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.wire.some_sites import FromOneSite, WithinGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class WithGroup(Apply):
    """Applied as ``inner`` says, to what the sites of the rule's group have in common."""

    inner: Apply

    @property
    def optimizer(self) -> Any:
        """The outer optimizer of ``inner``; None where the mean is the value."""
        return getattr(self.inner, "optimizer", None)

    @property
    def mixing(self) -> float:
        """That of ``inner``."""
        return getattr(self.inner, "mixing", 0.0)

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """Parameters keep a global copy, states do not."""
        return (GroupParameters if rule.state == PARAMETERS else SyncedState)(rule, tensors, options)


class ValuesOfGroup(ValuesWithGlobalCopy, TakenFromPeers):
    """A global copy that is equal at the sites of a group.

    Whoever gives a newcomer the shared state may be of another group, so this is no part of it: a newcomer takes it over
    in its first round, from the site of its own group that is furthest.
    """

    facts = StateFacts(copies=1, equal_in_group=True)

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        self.transfer = WithinGroup(FromOneSite(rule.wire.bucket_elements), rule.group)

    def shared_state(self) -> NamedState:
        """Nothing that all sites share."""
        return {}

    def private_state(self) -> NamedState:
        """Global values and the outer optimizer's state, of the site's group."""
        return super().shared_state()

    def agreed_state(self) -> NamedState:
        """All that the sites of the group share."""
        return self.private_state()

    @torch.no_grad()
    def offered(self) -> list[torch.Tensor]:
        """Messages (fp32 ``[numel]``): the values, then each state of the outer optimizer; a number fills one."""
        messages = []
        for key in self._keys():
            message = torch.empty(self.numel, dtype=torch.float32, device=self.tensors.device)
            for part, own in zip(self.tensors.split(message), self.private_state().values(), strict=True):
                part.copy_(own[key]) if isinstance(own[key], torch.Tensor) else part.fill_(own[key])
            messages.append(message)
        return messages

    @torch.no_grad()
    def take_over(self, messages: Sequence[torch.Tensor]) -> None:
        """Take a member's values for the group's, and drop local work."""
        for key, message in zip(self._keys(), messages, strict=True):
            for place, (own, part) in enumerate(
                zip(self.private_state().values(), self.tensors.split(message), strict=True)
            ):
                if not isinstance(own[key], torch.Tensor):
                    assert self.outer is not None
                    state, number = self.outer.state[self.global_parts[place]], part.reshape(-1)[:1]
                    state[key.removeprefix("outer.")] = type(own[key])(number.item()) if part.numel() else own[key]
                elif own[key].dim():
                    own[key].copy_(part)
                elif part.numel():
                    own[key].copy_(part.reshape(-1)[0])
        self.start_local()

    def start_local(self) -> None:
        """The local parameters of a newcomer: the group's."""
        self.reset_local_to_global()

    def _keys(self) -> list[str]:
        """Of what a newcomer takes over; known also to a rank that has none of the parameters."""
        optimizer = getattr(self.rule.apply, "optimizer", None)
        if optimizer is None:
            return [self.value_key]
        probe = torch.zeros(1, 1)
        return [self.value_key, *sorted(f"outer.{key}" for key in optimizer.build([probe]).state[probe])]


class GroupParameters(ValuesOfGroup, SyncedParameters):
    """Parameters of which a contribution is an update of the group's global copy."""
