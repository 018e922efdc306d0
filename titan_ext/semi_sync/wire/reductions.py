"""Summing a flat tensor over the sites of a quorum, in place; ``coded_reductions`` does it through a codec.

Values are cut into buckets, of which some are under way at a time: enough to keep the wire busy while others are coded
or summed, few enough to bound what lies in memory beside the values. Two sites send each other all they have, which is
as many bytes as any other way and half a round trip. Of more sites each is the owner of one shard of every bucket: it
gets the others' values of it, sums them, and sends the sum to all.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.wire.collectives import ByteCollectives, MessagesInTurn, Traffic, overlap
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.wire.manager import QuorumWire

UNDER_WAY = 2
"""Buckets of the largest size that are under way at a time; of smaller ones as many more as have the same size together."""
_BUCKETS = 16
"""Into which a reduction is cut at least, so that coding, sending and summing overlap."""
_LEAST_ELEMENTS = 2**18
"""Smaller buckets cost more work than they hide."""

RankSum = Callable[[torch.Tensor], torch.Tensor]
"""Sums a small tensor over the ranks of the site. A collective over them."""


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """What a reduction learns of its round; but for ``rank``, ``rank_sum`` and ``now``, equal at all sites."""

    step: int
    """Inner step of the round."""
    weights: Sequence[float]
    """Of each site's values, which are multiplied by it already; 0 where a site gives none."""
    rank_sum: RankSum = lambda tensor: tensor
    """Over the ranks that hold the shards of one contribution; by default this rank holds it whole."""
    rank: int = 0
    """Of this site in the quorum."""
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By group key a number of each site's label, in the order of the quorum."""
    now: Callable[[], float] = time.perf_counter
    """What the exchange is timed by."""

    def members(self, group: str) -> list[int]:
        """Ranks of the sites that have this site's label."""
        labels = self.labels[group]
        return [rank for rank, label in enumerate(labels) if label == labels[self.rank]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How the messages of a reduction wait for each other."""

    peers: int
    """Other sites among which what a site sends is spread."""
    buckets: int = 1
    at_most: int = 1
    """Buckets that are under way at a time."""
    hops: int = 1
    """Messages between sites, one after the other, that a bucket takes."""
    before: int = 0
    """Messages, one after the other, without which no bucket begins."""


class Reduction(ABC):
    """One way to sum tensors over sites; holds no state between rounds but what it has sent and received."""

    cuts_anywhere: bool = True
    """Whether the sum of an element depends on that element's values alone, up to a codec's loss."""
    sums_over_ranks: bool = False
    """Whether it calls ``RoundFacts.rank_sum``, for which all ranks of the site have to meet."""

    _traffic = Traffic()

    @abstractmethod
    def wire_bytes(self, numel: int, sites: int) -> int:
        """Bytes that a rank sends (and receives) to sum ``numel`` elements over ``sites``."""

    def turns(self, numel: int, sites: int) -> Turns:
        """How the messages that sum ``numel`` elements over ``sites`` wait for each other."""
        return Turns(peers=sites - 1)

    @abstractmethod
    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        """Replace ``values`` by their sum over the sites. Errors are the manager's, never raised.

        Args:
            manager: with a quorum.
            values: fp32 ``[numel]``; undefined after an error.
            of: what is known of the round.
            residual: fp32 ``[numel]``, filled with what the other sites could not read of our values, and with what
                nobody could of sums that this site coded for all.
        """

    def scratch_elements(self, numel: int, sites: int) -> int:
        """fp32 elements' worth of memory that ``reduce`` takes beside ``values``."""
        return 0

    def take_traffic(self) -> Traffic:
        """What this rank has sent and received of values since the last call."""
        traffic, self._traffic = self._traffic, Traffic()
        return traffic


def reduced_together(rules: Sequence[int], reductions: Sequence[Reduction]) -> list[list[int]]:
    """Neighbouring rules that are summed alike travel as one: fewer and fuller buckets.

    Args:
        rules: places in the plan.
        reductions: of all rules of the plan, by place.
    """
    runs: list[list[int]] = []
    for index in rules:
        if runs and reductions[runs[-1][0]] is reductions[index]:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


@dataclass(frozen=True, slots=True)
class Buckets:
    """How many elements a bucket has, and how many buckets are under way at a time.

    Args:
        numel: elements to reduce.
        most: elements of the largest bucket.
        unit: elements of which a bucket, but for the last one, holds a multiple.
    """

    elements: int
    at_most: int

    @classmethod
    def of(cls, numel: int, most: int, unit: int = 1) -> "Buckets":
        """From sizes alone, so that all sites cut alike."""
        elements = min(max(1, most), max(_LEAST_ELEMENTS, -(-numel // _BUCKETS)))
        elements = -(-elements // unit) * unit
        return cls(elements, max(UNDER_WAY, UNDER_WAY * most // elements))

    def under_way(self, numel: int) -> int:
        """Elements of a reduction that are under way at a time."""
        return min(numel, self.at_most * self.elements)

    def turns(self, numel: int, *, peers: int, hops: int) -> Turns:
        """Of a reduction whose buckets take so many hops."""
        return Turns(peers=peers, buckets=-(-numel // self.elements), at_most=self.at_most, hops=hops)


class AllReduce(Reduction):
    """fp32 as it is: what is sent and received are parts of the values themselves, wherever they can be.

    Args:
        bucket_elements: largest message handed to the wire at once.
    """

    def __init__(self, bucket_elements: int) -> None:
        self._bucket_elements = bucket_elements

    def wire_bytes(self, numel: int, sites: int) -> int:
        return ring_all_reduce_bytes(4 * numel, sites)

    def turns(self, numel: int, sites: int) -> Turns:
        hops = 1 if sites == 2 else 2
        return Buckets.of(numel, self._bucket_elements).turns(numel, peers=sites - 1, hops=hops)

    def scratch_elements(self, numel: int, sites: int) -> int:
        # What the other sites send of a bucket, or of the shard of it that this site sums.
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
        if manager.process_group is None:  # a stand-in for a manager, which only knows sums
            for part in values.split(self._bucket_elements):
                manager.allreduce(part, reduce_op=ReduceOp.SUM).wait()
            return
        wire = ByteCollectives(manager, of.now)
        if wire.sites == 1 or not values.numel():
            return
        buckets = Buckets.of(values.numel(), self._bucket_elements)
        sum_bucket = self._sum_with_peer if wire.sites == 2 else self._sum_by_owners
        parts = enumerate(values.split(buckets.elements))
        overlap(wire, (self._sum_on_wire(wire, part, place, sum_bucket) for place, part in parts), buckets.at_most)
        self._traffic += wire.traffic

    def _sum_on_wire(
        self,
        wire: ByteCollectives,
        values: torch.Tensor,
        place: int,
        sum_bucket: Callable[[ByteCollectives, torch.Tensor, int], MessagesInTurn],
    ) -> MessagesInTurn:
        """Where the wire takes them; what lies elsewhere is copied there and back."""
        there = values.to(wire.device)
        yield from sum_bucket(wire, there, place)
        if there is not values:
            values.copy_(there)

    def _sum_with_peer(self, wire: ByteCollectives, values: torch.Tensor, place: int) -> MessagesInTurn:
        (peer,) = wire.others
        theirs = torch.empty_like(values)
        yield wire.swap({peer: values}, {peer: theirs}, place)
        values.add_(theirs)  # of two it does not matter which is first

    def _sum_by_owners(self, wire: ByteCollectives, values: torch.Tensor, place: int) -> MessagesInTurn:
        shards = values.tensor_split(wire.sites)
        own = shards[wire.rank]
        rows = own.new_empty(wire.sites - 1, own.numel())
        received = dict(zip(wire.others, rows, strict=True))
        yield wire.swap({site: shards[site] for site in wire.others}, received, 2 * place)
        total, *rest = [{**received, wire.rank: own}[site] for site in range(wire.sites)]
        total = total.clone() if total is own else total
        for each in rest:
            total.add_(each)
        own.copy_(total)
        # Hazard: sums come into the places from which shards were sent. Their owner has them, or there were no sum yet.
        yield wire.swap(dict.fromkeys(wire.others, own), {site: shards[site] for site in wire.others}, 2 * place + 1)
