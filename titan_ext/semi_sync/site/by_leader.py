"""One rank of a site exchanges whole tensors for all of them: for sites of different layout."""

from collections.abc import Sequence

import torch

from titan_ext.semi_sync.site.leader_manager import LedManager
from titan_ext.semi_sync.site.shards import SiteShards
from titan_ext.semi_sync.state.synced_state import SyncedRow
from titan_ext.semi_sync.wire.manager import ReplicaManager
from titan_ext.semi_sync.wire.reductions import Reduction


class ByLeader:
    """Tensors are made whole on the leader some at a time, exchanged, and cut up again.

    Args:
        rows: the plan's rows bound to this rank.
        shards: the shards of the site's parameters.
        bucket_elements: about how much is whole at once, more if one tensor is larger.

    Raises:
        ValueError: a row is not elementwise, so that sites of different layout cannot exchange it.
    """

    name = "leader"

    def __init__(self, rows: Sequence[SyncedRow], shards: SiteShards, bucket_elements: int) -> None:
        for row in rows:
            if not row.any_layout:
                raise ValueError(
                    f'pairing = "leader": {type(row).__name__} of the method works on a rank\'s own shards; '
                    'give all sites one parallel layout, or set semi_sync.pairing = "rank"'
                )
        self._shards = shards
        self._bucket_elements = max(1, bucket_elements)
        held = shards.gather([row.names for row in rows])
        self._names = [sorted({name for names in held for name in names[index]}) for index in range(len(rows))]
        self._index = {id(row): index for index, row in enumerate(rows)}
        self._rows = rows

    def fingerprint(self, rows: Sequence[SyncedRow]) -> dict[str, str]:
        """What sites that pair so must have in common beside their settings: every whole tensor."""
        shapes = [
            (row.row.key, name, row.agreed_shape(self._shards.shape(name)))
            for row, names in zip(rows, self._names)
            for name in names
        ]
        return {"model": repr(shapes), "pairing": self.name}

    def speaks_for(self, name: str) -> bool:
        """Whether this rank's shard of a parameter counts in the site's checksum: of equal shards one does."""
        return self._shards.sends(self._shards.rank, name)

    def wire_bytes(self, reduction: Reduction, rows: Sequence[int], sites: int) -> int:
        """Bytes that the leader sends to sum ``rows`` (indices)."""
        total = 0
        for index in rows:
            for batch in self._shards.batches(self._names[index], self._bucket_elements):
                numel = sum(torch.Size(self._shards.shape(name)).numel() for name in batch)
                total += self._rows[index].values_per_element * reduction.wire_bytes(numel, sites)
            total += reduction.wire_bytes(self._rows[index].plain_numbers, sites)
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
        assert isinstance(manager, LedManager)
        wants_lost = lost is not None  # on all ranks or on none
        travelled = True
        for row, own, own_lost in zip(rows, *(_by_row(rows, flat) for flat in (values, lost))):
            index = self._index[id(row)]
            sections = [row.elements] * row.values_per_element + [row.plain_numbers]
            parts = own.split(sections)
            lost_parts = own_lost.split(sections) if own_lost is not None else [None] * len(sections)
            for part, lost_part in zip(parts[:-1], lost_parts[:-1]):
                for batch in self._shards.batches(self._names[index], self._bucket_elements):
                    travelled &= self._reduce_batch(
                        reduction, manager, row, batch, part, lost_part, wants_lost, clock=clock, weights=weights
                    )
            self._reduce_numbers(reduction, manager, parts[-1], clock=clock, weights=weights)
        return bool(self._shards.share(travelled))

    def _reduce_batch(self, reduction, manager, row, names, part, lost_part, wants_lost, **of_round) -> bool:
        own = dict(zip(row.names, row.split(part)))
        whole = self._shards.collect(names, own)
        travelled, whole_lost = True, None
        if whole is not None:
            whole_lost = torch.empty_like(whole) if wants_lost else None
            travelled = reduction.reduce(manager.leading, whole, lost=whole_lost, **of_round)
        for name, dealt in self._shards.deal(names, whole).items():
            own[name].copy_(dealt)
        if wants_lost:
            own_lost = dict(zip(row.names, row.split(lost_part))) if lost_part is not None else {}
            for name, dealt in self._shards.deal(names, whole_lost).items():
                own_lost[name].copy_(dealt)
        return travelled

    def _reduce_numbers(self, reduction, manager, numbers: torch.Tensor, **of_round) -> None:
        """Plain numbers are the same on all ranks of a site: the leader's travel."""
        if not numbers.numel():
            return
        summed = numbers.to("cpu", copy=True)
        if self._shards.is_leader:
            reduction.reduce(manager.leading, summed, **of_round)
        self._shards.share_tensor(summed)
        numbers.copy_(summed)


def _by_row(rows: Sequence[SyncedRow], flat: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None] * len(rows) if flat is None else list(flat.split([row.numel for row in rows]))

