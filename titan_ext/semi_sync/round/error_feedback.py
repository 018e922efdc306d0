"""Error feedback: what a codec took away from a contribution goes into the next one of the same rule."""

from collections.abc import Mapping, Sequence

import torch

from titan_ext.semi_sync.round.round import RoundResult, Sum
from titan_ext.semi_sync.state.synced_state import SyncedState


class ErrorFeedback:
    """What reductions have taken away so far; it is this site's alone.

    Args:
        states: the plan's rules bound to this rank.
        device: where the memory lies.
    """

    def __init__(self, states: Sequence[SyncedState], device: torch.device) -> None:
        self._states = states
        self._residuals = {
            index: torch.zeros(state.numel, device=device) for index, state in enumerate(states) if state.feeds_back
        }

    def takes(self, index: int) -> bool:
        """Whether anybody wants to know what a rule's reduction takes away."""
        return index in self._residuals or self._states[index].takes_residual

    def add(self, index: int, contribution: torch.Tensor) -> None:
        """Put what a rule is owed into its contribution (fp32 ``[numel]``, not yet multiplied by its weight)."""
        if index in self._residuals:
            contribution.add_(self._residuals[index])

    def settle(self, committed: Sum) -> None:
        """Call when a round is committed: what it took away is owed by the next one."""
        for index, residual in committed.residuals.items():
            if not self._states[index].takes_residual:
                self._residuals[index] = self._owed(index, committed)
            elif committed.weight > 0:
                self._states[index].take_residual(residual)

    def checkpoint_state(self, in_flight: RoundResult | None) -> dict[str, dict[str, torch.Tensor]]:
        """By rule and parameter, with global shapes.

        Args:
            in_flight: a reduced round that has not been applied; what it took away counts as settled.
        """
        flying = in_flight.sum if in_flight is not None else None
        return {
            self._states[index].key: self._states[index].named_message(
                flat if flying is None else self._owed(index, flying)
            )
            for index, flat in self._residuals.items()
        }

    def _owed(self, index: int, of: Sum) -> torch.Tensor:
        """What a rule is owed after a round; one to which this site gave nothing has paid nothing either."""
        residual = of.residuals.get(index)
        if residual is None:
            return self._residuals[index]
        return residual if of.weight > 0 else self._residuals[index] + residual

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore what ``checkpoint_state`` returned."""
        for index, flat in self._residuals.items():
            self._states[index].fill_message(flat, state[self._states[index].key])
