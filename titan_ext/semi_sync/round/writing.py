"""What a site puts into a round: pseudo-gradients, states and residuals, weighted, in one buffer."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from titan_ext.semi_sync.plan.plan import OutlierGuard
from titan_ext.semi_sync.plan.weighting import NO_STANDING, Standing
from titan_ext.semi_sync.round.contributions import Contribution, ErrorFeedback, is_finite, new_buffer
from titan_ext.semi_sync.round.spans import span
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.sources.bank import Bank
from titan_ext.semi_sync.state.synced_state import Guarded, SyncedState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionWriter:
    """Writes the contributions of a rank."""

    states: Sequence[SyncedState]
    """The plan's rules bound to this rank."""
    error_feedback: ErrorFeedback
    bank: Bank
    """What the sources of this site that have had their turn bring to the round."""
    guard: OutlierGuard
    site: SiteRanks
    device: torch.device
    """Where buffers live."""

    def write(self, rules: Sequence[int], step: int, weight: float, standing: Standing = NO_STANDING) -> Contribution:
        """This site's weighted contribution to the rules of a round, in a fresh buffer. A collective over the site.

        Args:
            rules: indices of the rules.
            step: inner step of the round.
            weight: of what the model has come to, beside what is in the bank; 0 contributes nothing, the bank neither.
            standing: what else the site tells of itself.
        """
        for state in self.states:
            state.check()
        buffer, parts = new_buffer(rules, self.states, self.device)
        if weight <= 0:
            return self.nothing(buffer, parts)
        squares = []
        with span("contribution"):
            for index, part in parts.items():
                self.states[index].write(part, step)
            weight = self.bank.mean_with(buffer, parts, weight)
            for index, part in parts.items():
                state = self.states[index]
                if self._is_guarded(state):
                    squares.append(state.update_norm(part) ** 2)
                self.error_feedback.add(index, part)
                if weight != 1.0:
                    part.mul_(weight)
        by_rank = self.site.gather((is_finite(buffer), squares))
        norms = [math.sqrt(sum(ranks)) for ranks in zip(*(each for _, each in by_rank), strict=True)]
        all_finite = all(finite for finite, _ in by_rank)
        for index in rules:
            self.states[index].launched(all_finite)
        if all_finite:
            return Contribution(weight, buffer, parts, norms, standing=standing)
        # One NaN would reach every site. What the others agree on comes back and heals this one.
        logger.warning("this site's contribution after inner step %d is not finite; it is left out of the round", step)
        return replace(self.nothing(buffer, parts), is_finite=False)

    def clip(self, contribution: Contribution, factors: Sequence[float]) -> None:
        """Bring each guarded rule's update back to its bound, by these factors."""
        parts: list[tuple[Any, torch.Tensor]] = [
            (self.states[index], part)
            for index, part in contribution.parts.items()
            if self._is_guarded(self.states[index])
        ]
        for (state, part), factor in zip(parts, factors, strict=True):
            state.damp(part, factor, contribution.weight)

    def nothing(self, buffer: torch.Tensor, parts: dict[int, torch.Tensor]) -> Contribution:
        """Contribute nothing."""
        guarded = sum(self._is_guarded(self.states[index]) for index in parts)
        return Contribution(0.0, buffer.zero_(), parts, [0.0] * guarded)

    def _is_guarded(self, state: SyncedState) -> TypeGuard[Guarded]:
        return isinstance(state, Guarded) and self.guard.threshold > 0
