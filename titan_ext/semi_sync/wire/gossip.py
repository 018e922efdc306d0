"""Exchange in pairs: every site with one other, drawn anew each round by a seed that all share."""

from collections.abc import Iterable

import torch
from torch.distributed import Work

from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device
from titan_ext.semi_sync.wire.reductions import UNDER_WAY, Reduction, RoundFacts


def partner_of(site: int, sites: int, step: int) -> int | None:
    """The site that ``site`` meets in the round of inner step ``step``; None for the one left over.

    A permutation seeded by the round, cut into pairs (as in the authors' code).
    """
    order = torch.randperm(sites, generator=torch.Generator().manual_seed(step)).tolist()
    place = order.index(site) ^ 1
    return order[place] if place < sites else None


class PairExchange(Reduction):
    """The sum over this site and its partner of the round, in fp32.

    Args:
        bucket_elements: largest message handed to the wire at once.
    """

    def __init__(self, bucket_elements: int) -> None:
        self._bucket_elements = max(1, bucket_elements)

    def wire_bytes(self, numel: int, sites: int) -> int:
        """Of a site that has a partner; an odd one out sends nothing."""
        return 4 * numel if sites > 1 else 0

    def scratch_elements(self, numel: int, sites: int) -> int:
        return min(numel, UNDER_WAY * self._bucket_elements)

    def reduce(
        self,
        manager: ReplicaManager,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> bool:
        if residual is not None:
            residual.zero_()
        sites = manager.num_participants()
        partner = partner_of(manager.participating_rank(), sites, of.step) if sites > 1 else None
        if partner is None or manager.errored() is not None:
            return False
        try:
            self._exchange(manager, values, partner)
        except RuntimeError as error:
            manager.report_error(error)
        return True

    def _exchange(self, manager: ReplicaManager, values: torch.Tensor, partner: int) -> None:
        group, wire = manager.process_group, wire_device(manager)
        under_way: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Work]]] = []
        for tag, bucket in enumerate(values.split(self._bucket_elements)):
            sent, received = bucket.to(wire), torch.empty_like(bucket, device=wire)
            works = [group.send([sent], partner, tag), group.recv([received], partner, tag)]
            # What is sent must live until it has left.
            under_way.append((bucket, sent, received, works))
            if len(under_way) == UNDER_WAY:
                _receive(under_way.pop(0))
        for each in under_way:
            _receive(each)


def _receive(each: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Iterable[Work]]) -> None:
    bucket, _, received, works = each
    for work in works:
        work.wait()
    bucket.add_(received.to(bucket.device))
