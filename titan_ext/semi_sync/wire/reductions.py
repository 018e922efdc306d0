"""Summing a flat tensor over the sites of a quorum, in place, plainly or through a codec.

Gloo matches the collectives of two sites by their order alone. Every reduction therefore issues
them in an order that depends on nothing but sizes. A few buckets are under way at a time: enough to
keep the wire busy while others are coded, few enough to bound what lies in memory beside the values.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ReduceOp, Work

from titan_ext.semi_sync.wire.codecs import Codec
from titan_ext.semi_sync.wire.collectives import ByteCollectives
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.wire.manager import ReplicaManager

UNDER_WAY = 2
"""Buckets handed to the wire before the first of them is waited for."""

RankSum = Callable[[torch.Tensor], torch.Tensor]
"""Sums a small tensor over the ranks of the site. A collective over them."""


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """What a reduction learns of its round; but for ``rank_sum``, equal at all sites."""

    step: int
    """Inner step of the round."""
    weights: Sequence[float]
    """Of each site's values, which are multiplied by it already; 0 where a site gives none."""
    rank_sum: RankSum = lambda tensor: tensor
    """Over the ranks that hold the shards of one contribution; by default this rank holds it whole."""


class Reduction(ABC):
    """One way to sum tensors over sites; holds no state between rounds."""

    @abstractmethod
    def wire_bytes(self, numel: int, sites: int) -> int:
        """Bytes that a rank sends (and receives) to sum ``numel`` elements over ``sites``."""

    def hops(self, sites: int) -> int:
        """Messages between sites, one after the other, that a bucket takes."""
        return 1

    @abstractmethod
    def reduce(
        self,
        manager: ReplicaManager,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> bool:
        """Replace ``values`` by their sum over the sites. Errors are the manager's, never raised.

        Args:
            manager: with a quorum.
            values: fp32 ``[numel]``; undefined after an error.
            of: what is known of the round.
            residual: fp32 ``[numel]``, filled with what the other sites could not read of our values, and with what
                nobody could of sums that this site coded for all.

        Returns:
            whether there was a site to exchange with.
        """

    def scratch_elements(self, numel: int, sites: int) -> int:
        """fp32 elements' worth of memory that ``reduce`` takes beside ``values``."""
        return 0

    def take_sent(self) -> int:
        """Bytes that this rank has sent since the last call, where they do not follow from sizes alone."""
        return 0


class AllReduce(Reduction):
    """fp32 in buckets, each a ring all-reduce.

    Args:
        bucket_elements: largest message handed to the wire at once.
    """

    def __init__(self, bucket_elements: int) -> None:
        self._bucket_elements = bucket_elements

    def wire_bytes(self, numel: int, sites: int) -> int:
        return ring_all_reduce_bytes(4 * numel, sites)

    def hops(self, sites: int) -> int:
        return 2 * (sites - 1)

    def scratch_elements(self, numel: int, sites: int) -> int:
        # Gloo's ring keeps a copy of what it passes on.
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
        works: deque[Work] = deque()
        for bucket in values.split(self._bucket_elements) if values.numel() else ():
            works.append(manager.allreduce(bucket, reduce_op=ReduceOp.SUM))
            if len(works) == UNDER_WAY:
                works.popleft().wait()
        for work in works:
            work.wait()
        return manager.num_participants() > 1


class CodedReduction(Reduction):
    """Messages of a codec, summed in fp32.

    A dense codec: each site is the owner of one shard of every bucket, gets the others' messages
    for it (all-to-all), sums them in fp32 and sends the coded sum to all (all-gather). The owner
    too takes the decoded message, so all sites hold the same bits; what this second coding loses is the
    owner's to feed back. A sparse codec, or ``to_all``: every site gets every message and sums them in the
    order of the sites.
    """

    def __init__(self, codec: Codec, bucket_elements: int, *, to_all: bool = False) -> None:
        self._codec = codec
        self._bucket_elements = bucket_elements
        self._to_all = to_all or codec.sparse

    def wire_bytes(self, numel: int, sites: int) -> int:
        passes = 1 if self._to_all else 2
        bucket = self._bucket(sites)
        sizes = [min(bucket, numel - start) for start in range(0, numel, bucket)]
        return sum(passes * (sites - 1) * self._codec.wire_bytes(self._shard(size, sites)) for size in sizes)

    def hops(self, sites: int) -> int:
        # Gloo's all-to-all is one message to each, its all-gather a ring.
        return (0 if self._to_all else 1) + sites - 1

    def scratch_elements(self, numel: int, sites: int) -> int:
        message = self._codec.wire_bytes(self._shard(min(numel, self._bucket(sites)), sites)) // 4
        # What a bucket sends and receives, in both passes.
        return 4 * UNDER_WAY * sites * message

    def reduce(
        self,
        manager: ReplicaManager,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> bool:
        wire = ByteCollectives(manager)
        bucket_elements = self._bucket(wire.sites)
        scattered: deque[_Bucket] = deque()
        gathered: deque[_Bucket] = deque()
        residuals = residual.split(bucket_elements) if residual is not None else None
        for index, values_of in enumerate(values.split(bucket_elements) if values.numel() else ()):
            scattered.append(self._send(wire, values_of, residuals[index] if residuals is not None else None))
            if len(scattered) == UNDER_WAY:
                gathered.append(self._pass_on(wire, scattered.popleft()))
            if len(gathered) == UNDER_WAY:
                self._finish(wire, gathered.popleft(), of)
        while scattered or gathered:
            if scattered:
                gathered.append(self._pass_on(wire, scattered.popleft()))
            if gathered and (len(gathered) == UNDER_WAY or not scattered):
                self._finish(wire, gathered.popleft(), of)
        return wire.sites > 1

    def _bucket(self, sites: int) -> int:
        """Whole shards, so that nothing but the last bucket needs padding."""
        unit = self._codec.granularity * (1 if self._to_all else sites)
        return -(-self._bucket_elements // unit) * unit

    def _shard(self, numel: int, sites: int) -> int:
        """Elements a message carries for a bucket of ``numel``."""
        whole = numel if self._to_all else -(-numel // sites)
        return -(-whole // self._codec.granularity) * self._codec.granularity

    def _send(self, wire: ByteCollectives, values: torch.Tensor, residual: torch.Tensor | None) -> "_Bucket":
        """Code a bucket and hand it to the wire."""
        copies = 1 if self._to_all else wire.sites
        shard = self._shard(values.numel(), wire.sites)
        padded = values
        if values.numel() != copies * shard:
            padded = values.new_zeros(copies * shard)
            padded[: values.numel()] = values
        message = torch.empty(copies, self._codec.wire_bytes(shard), dtype=torch.uint8, device=values.device)
        for part, row in zip(padded.view(copies, shard), message, strict=True):
            self._codec.encode(part, row)
        if residual is not None:
            decoded = torch.empty_like(padded).view(copies, shard)
            for part, row in zip(decoded, message, strict=True):
                self._codec.decode(row, part)
            torch.sub(values, decoded.view(-1)[: values.numel()], out=residual)
        received, work = wire.gather(message[0]) if self._to_all else wire.exchange(message)
        return _Bucket(values, shard, received, work, residual)

    def _pass_on(self, wire: ByteCollectives, bucket: "_Bucket") -> "_Bucket":
        """Sum the shard that this site owns, and hand the sum to the wire."""
        if self._to_all:
            return bucket
        wire.wait(bucket.work)
        total = torch.empty(bucket.shard, dtype=torch.float32, device=bucket.values.device)
        self._codec.combine(bucket.received.to(total.device), total)
        message = torch.empty_like(bucket.received[0], device=total.device)
        self._codec.encode(total, message)
        if bucket.residual is not None:
            decoded = torch.empty_like(total)
            self._codec.decode(message, decoded)
            own = bucket.residual[wire.rank * bucket.shard :][: bucket.shard]
            own.add_(total.sub_(decoded)[: own.numel()])
        return _Bucket(bucket.values, bucket.shard, *wire.gather(message))

    def _finish(self, wire: ByteCollectives, bucket: "_Bucket", of: RoundFacts) -> None:
        """Write the sum into the values."""
        wire.wait(bucket.work)
        values, received = bucket.values, bucket.received.to(bucket.values.device)
        copies = 1 if self._to_all else wire.sites
        whole = values.numel() == copies * bucket.shard
        out = values if whole else values.new_empty(copies * bucket.shard)
        if self._to_all:
            self._combine(received, of, out)
        else:
            for part, row in zip(out.view(copies, bucket.shard), received, strict=True):
                self._codec.decode(row, part)
        if not whole:
            values.copy_(out[: values.numel()])

    def _combine(self, messages: torch.Tensor, of: RoundFacts, out: torch.Tensor) -> None:
        """Overwrite ``out`` with what all sites' messages come to, where every site gets them all."""
        self._codec.combine(messages, out)


Combine = Callable[[torch.Tensor], torch.Tensor]
"""fp32 ``[contributors, numel]`` to their aggregate ``[numel]``; the contributions may be overwritten."""


class ElementwiseReduction(CodedReduction):
    """An aggregate of the contributions, bucket by bucket, times the sum of their weights, which must be equal.

    Args:
        codec: how values travel.
        bucket_elements: largest message handed to the wire at once.
        combine: the aggregate of some elements.
    """

    def __init__(self, codec: Codec, bucket_elements: int, combine: Combine) -> None:
        super().__init__(codec, bucket_elements, to_all=True)
        self._aggregate = combine

    def _combine(self, messages: torch.Tensor, of: RoundFacts, out: torch.Tensor) -> None:
        contributors = contributing(of.weights)
        if not contributors:
            out.zero_()
            return
        values = out.new_empty(len(contributors), out.numel())
        for rank, row in zip(contributors, values, strict=True):
            self._codec.decode(messages[rank], row)
        torch.mul(self._aggregate(values), math.fsum(of.weights), out=out)


class WholeReduction(ElementwiseReduction):
    """An aggregate that sees this rank's shards of whole contributions: all buckets are gathered first.

    Args:
        codec: how values travel.
        bucket_elements: largest message handed to the wire at once.
        combine: the aggregate of this rank's shards; sums over the ranks of the site with its second argument.
    """

    def __init__(
        self, codec: Codec, bucket_elements: int, combine: Callable[[torch.Tensor, RankSum], torch.Tensor]
    ) -> None:
        super().__init__(codec, bucket_elements, self._keep)
        self._whole = combine
        self._gathered: list[torch.Tensor] = []

    def scratch_elements(self, numel: int, sites: int) -> int:
        return sites * numel + super().scratch_elements(numel, sites)

    def reduce(
        self,
        manager: ReplicaManager,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> bool:
        self._gathered.clear()
        travelled = super().reduce(manager, values, of, residual)
        contributors = contributing(of.weights)
        if contributors:
            # A rank without elements has part in the sums over the ranks all the same.
            parts = self._gathered or [values.new_empty(len(contributors), 0)]
            gathered = torch.cat(parts, dim=1)[:, : values.numel()]
            self._gathered.clear()
            values.copy_(self._whole(gathered, of.rank_sum).mul_(math.fsum(of.weights)))
        return travelled

    def _keep(self, contributions: torch.Tensor) -> torch.Tensor:
        self._gathered.append(contributions)
        return contributions[0]


def contributing(weights: Sequence[float]) -> list[int]:
    """Ranks of the sites that give something."""
    return [rank for rank, weight in enumerate(weights) if weight > 0]


class _Bucket:
    """A bucket whose messages are on their way."""

    __slots__ = ("values", "shard", "received", "work", "residual")

    def __init__(
        self,
        values: torch.Tensor,
        shard: int,
        received: torch.Tensor,
        work: Work | None,
        residual: torch.Tensor | None = None,
    ) -> None:
        self.values, self.shard, self.received, self.work, self.residual = values, shard, received, work, residual
