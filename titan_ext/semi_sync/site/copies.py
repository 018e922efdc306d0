"""Ranks of a site that hold the same: what they hold travels once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.site.shards import gloo_group


class Copies:
    """The ranks that hold exactly what this one holds, such as the replicas of hybrid sharding (HSDP).

    Each of them exchanges a part of its own with its like at the other sites; once the ranks of the site have voted for the
    round, they give each other their parts. Building it is a collective over the site.

    Args:
        held: describes all that this rank holds, equally at ranks that hold the same.
        site: the ranks of the site.
    """

    def __init__(self, held: Any, site: SiteRanks) -> None:
        everyones = site.gather(held)
        ranks = dist.get_process_group_ranks(site.group or dist.group.WORLD) if not site.alone else [0]
        self._members = [rank for rank, theirs in zip(ranks, everyones, strict=True) if theirs == held]
        self._place = 0 if site.alone else self._members.index(dist.get_rank())
        # Its own, since an exchange in flight and the inner step use others meanwhile.
        self._group = gloo_group(self._members, among_themselves=True) if len(self._members) > 1 else None

    @property
    def count(self) -> int:
        """Ranks that hold the same, this one included."""
        return len(self._members)

    def own_part(self, values: torch.Tensor) -> torch.Tensor:
        """The part of some values that this rank exchanges."""
        return values.tensor_split(self.count)[self._place]

    def share_parts(self, stretches: Sequence[torch.Tensor]) -> None:
        """Overwrite the others' parts of some values by theirs. A collective over those that hold the same."""
        for values in stretches:
            for rank, part in zip(self._members, values.tensor_split(self.count), strict=True):
                if part.numel():
                    dist.broadcast(part, src=rank, group=self._group)
