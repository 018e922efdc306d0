"""Rank r of a site exchanges with rank r of the others: most bandwidth, for sites of equal layout."""

from collections.abc import Sequence

import torch

from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.synced_state import SyncedRow
from titan_ext.semi_sync.wire.manager import ReplicaManager
from titan_ext.semi_sync.wire.reductions import Reduction


class ByRank:
    """What a rank holds is what it exchanges.

    Args:
        rows: the plan's rows bound to this rank.
        site: the ranks of the site.

    Raises:
        ValueError: tables shared by row are cut over the ranks, which then hold other rows at every site.
    """

    name = "rank"

    def __init__(self, rows: Sequence[SyncedRow], site: SiteRanks) -> None:
        for row in rows:
            if row.by_row and any(part.shape != row.view.parameters[name].shape for name, part in row.described()):
                raise ValueError(
                    'pairing = "rank": tables shared by row are cut over the ranks of the site; '
                    'set semi_sync.pairing = "leader"'
                )
        # A row's own reduction may depend on a rank's shapes: each counts with its own.
        self._ranks = site.gather([(row.numel, row.reduction) for row in rows])
        self._layout = str(len(self._ranks))

    def fingerprint(self, rows: Sequence[SyncedRow]) -> dict[str, str]:
        """What sites that pair so must have in common beside their settings: every shard."""
        shards = [
            (row.row.key, name, row.agreed_shape(tensor.shape)) for row in rows for name, tensor in row.described()
        ]
        return {"model and layout": repr(shards), "ranks": self._layout}

    def speaks_for(self, name: str) -> bool:
        """Whether this rank's shard of a parameter counts in the site's checksum: sites of equal layout count alike."""
        return True

    def wire_bytes(self, reduction: Reduction, rows: Sequence[int], sites: int) -> int:
        """Bytes that the site sends to sum neighbouring ``rows`` (indices), all its ranks together."""
        total = 0
        for rank in self._ranks:
            numel, own = sum(rank[index][0] for index in rows), rank[rows[0]][1]
            total += (own or reduction).wire_bytes(numel, sites)
        return total

    def reduce(
        self,
        reduction: Reduction,
        manager: ReplicaManager,
        rows: Sequence[SyncedRow],
        values: torch.Tensor,
        *,
        clock: int,
        weights: Sequence[float],
        lost: torch.Tensor | None,
    ) -> bool:
        """Sum the messages of neighbouring ``rows``, which lie one after the other in ``values``; see ``Reduction``."""
        return reduction.reduce(manager, values, clock=clock, weights=weights, lost=lost)
