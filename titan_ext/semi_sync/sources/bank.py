"""What the sources of a site bring to a round, added up as each ends: partial aggregation on the way up."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ext.semi_sync.round.contributions import is_finite, new_buffer
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.synced_state import SyncedState

logger = logging.getLogger(__name__)


class Bank:
    """The weighted sum of what the sources that have had their turn would each send; as large as one, however many.

    Weighted means are associative: that of a site's sources, weighted by their total, is their part of the mean over all
    (Photon, arXiv 2411.02908, streaming mean; Pollen, arXiv 2306.17453, partial aggregation).

    Args:
        states: the plan's rules bound to this rank.
        device: where the sums lie.
        site: the ranks of the site.
    """

    def __init__(self, states: Sequence[SyncedState], device: torch.device, site: SiteRanks) -> None:
        self._states, self._device, self._site = states, device, site
        self._sums: dict[int, torch.Tensor] = {}
        self.weight = 0.0
        """Of all that is in it."""

    @torch.no_grad()
    def add(self, rules: Sequence[int], step: int, weight: float) -> bool:
        """Add what the source that trains now has come to; what is not finite is left out. A collective over the site.

        Args:
            rules: indices of the rules of the round.
            step: inner step of the round.
            weight: of the source.

        Returns:
            whether it was finite.
        """
        buffer, parts = new_buffer(rules, self._states, self._device)
        for index, part in parts.items():
            self._states[index].write(part, step)
        if not all(self._site.gather(is_finite(buffer))):
            return False
        for index, part in parts.items():
            weighted = part.mul_(weight) if weight != 1.0 else part
            if index in self._sums:
                self._sums[index].add_(weighted)
            else:
                self._sums[index] = weighted.clone()
        self.weight += weight
        return True

    @torch.no_grad()
    def mean_with(self, buffer: torch.Tensor, parts: Mapping[int, torch.Tensor], weight: float) -> float:
        """Make of what the last source sends the mean of all of them; without it if it is not finite. A collective.

        Args:
            buffer: fp32, all messages.
            parts: by rule its stretch of the buffer.
            weight: of the last source.

        Returns:
            the weight of the mean.
        """
        if not self.weight:
            return weight
        if not all(self._site.gather(is_finite(buffer))):
            logger.warning("the last source's work is not finite; the site's others go into the round without it")
            buffer.zero_()
            weight = 0.0
        total = self.weight + weight
        for index, part in parts.items():
            part.mul_(weight).add_(self._sums[index]).div_(total)
        return total

    def clear(self) -> None:
        """A round has taken it along, or it counts no more."""
        self._sums, self.weight = {}, 0.0

    def checkpoint_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """By rule and parameter, with global shapes; zeros where there is nothing."""
        return {
            state.key: state.named_message(self._sums.get(index, torch.zeros(state.numel, device=self._device)))
            for index, state in enumerate(self._states)
            if not state.rule.final
        }

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]], weight: float) -> None:
        """Restore what ``checkpoint_state`` returned."""
        self.clear()
        if not weight:
            return
        self.weight = weight
        for index, each in enumerate(self._states):
            if each.key in state:
                self._sums[index] = torch.empty(each.numel, device=self._device)
                each.fill_message(self._sums[index], state[each.key])
