"""Exchange in pairs: every site with one other, drawn anew each round by a seed that all share."""

import torch

from titan_ext.semi_sync.wire.collectives import ByteCollectives, MessagesInTurn, overlap
from titan_ext.semi_sync.wire.manager import QuorumWire
from titan_ext.semi_sync.wire.reductions import Buckets, Reduction, RoundFacts, Turns


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

    def turns(self, numel: int, sites: int) -> Turns:
        return Buckets.of(numel, self._bucket_elements).turns(numel, peers=min(1, sites - 1), hops=1)

    def scratch_elements(self, numel: int, sites: int) -> int:
        return Buckets.of(numel, self._bucket_elements).under_way(numel) if sites > 1 else 0

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        if residual is not None:
            residual.zero_()
        wire = ByteCollectives(manager, of.now)
        partner = partner_of(wire.rank, wire.sites, of.step) if wire.sites > 1 else None
        if partner is None or manager.errored() is not None:
            return
        buckets = Buckets.of(values.numel(), self._bucket_elements)
        parts = enumerate(values.split(buckets.elements))
        overlap(wire, (_sum_with(partner, wire, part, place) for place, part in parts), buckets.at_most)
        self._traffic += wire.traffic


def _sum_with(partner: int, wire: ByteCollectives, values: torch.Tensor, place: int) -> MessagesInTurn:
    own = values.to(wire.device)
    theirs = torch.empty_like(own)
    yield wire.swap({partner: own}, {partner: theirs}, place)
    values.add_(theirs.to(values.device))
