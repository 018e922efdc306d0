"""Error feedback: what a codec took away from a contribution goes into the next one of the same row."""

from collections.abc import Mapping, Sequence

import torch

from titan_ext.semi_sync.round.round import Round
from titan_ext.semi_sync.state.synced_state import SyncedRow


class Residuals:
    """What reductions have lost so far; it is this site's alone.

    Args:
        rows: the plan's rows bound to this rank.
        device: where the memory lies.
    """

    def __init__(self, rows: Sequence[SyncedRow], device: torch.device) -> None:
        self._rows = rows
        self._kept = {
            index: torch.zeros(row.numel, device=device)
            for index, row in enumerate(rows)
            if row.feeds_back
        }

    def takes(self, index: int) -> bool:
        """Whether anybody wants to know what a row's reduction loses."""
        return index in self._kept or self._rows[index].takes_lost

    def add(self, index: int, contribution: torch.Tensor) -> None:
        """Put what a row has lost into its contribution (fp32 ``[numel]``)."""
        if index in self._kept:
            contribution.add_(self._kept[index])

    def settle(self, round_: Round) -> None:
        """Call when a round is committed: what it lost is owed by the next one."""
        for index, lost in round_.lost.items():
            if self._rows[index].takes_lost:
                self._rows[index].take_lost(lost)
            else:
                self._kept[index] = lost

    def checkpoint_state(self, flight: Round | None) -> dict[str, dict[str, torch.Tensor]]:
        """By row and parameter, with global shapes.

        Args:
            flight: a reduced round that has not landed; what it lost counts as settled.
        """
        lost = flight.lost if flight is not None else {}
        return {
            self._rows[index].row.key: self._rows[index].named_parts(lost.get(index, flat))
            for index, flat in self._kept.items()
        }

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore what ``checkpoint_state`` returned."""
        for index, flat in self._kept.items():
            self._rows[index].fill_from_parts(flat, state[self._rows[index].row.key])
