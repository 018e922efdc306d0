"""Summing a flat tensor over the sites through a codec, and aggregates that see every site's values."""

import math
from collections.abc import Callable, Sequence

import torch

from titan_ext.semi_sync.wire.codecs import Codec
from titan_ext.semi_sync.wire.collectives import ByteCollectives, MessagesInTurn, overlap
from titan_ext.semi_sync.wire.manager import QuorumWire
from titan_ext.semi_sync.wire.reductions import Buckets, RankSum, Reduction, RoundFacts, Turns


class CodedReduction(Reduction):
    """Messages of a codec, summed in fp32.

    A dense codec at more than two sites: each owner gets the others' messages for its shard, sums them in fp32 and
    sends the coded sum to all. The owner too takes the decoded message, so all sites hold the same bits; what this second
    coding loses is the owner's to feed back. Of two sites each adds what the other could read of both. A sparse codec, or
    ``to_all``: every site gets every message and sums them in the order of the sites.
    """

    def __init__(self, codec: Codec, bucket_elements: int, *, to_all: bool = False) -> None:
        self._codec = codec
        self._bucket_elements = bucket_elements
        self._always_to_all = to_all or codec.sparse

    def wire_bytes(self, numel: int, sites: int) -> int:
        passes = 1 if self._to_all(sites) else 2
        bucket = self._buckets(numel, sites).elements
        sizes = [min(bucket, numel - start) for start in range(0, numel, bucket)]
        return sum(passes * (sites - 1) * self._codec.wire_bytes(self._shard(size, sites)) for size in sizes)

    def turns(self, numel: int, sites: int) -> Turns:
        hops = 1 if self._to_all(sites) else 2
        return self._buckets(numel, sites).turns(numel, peers=sites - 1, hops=hops)

    def scratch_elements(self, numel: int, sites: int) -> int:
        buckets = self._buckets(numel, sites)
        size = min(numel, buckets.elements)
        message = self._codec.wire_bytes(self._shard(size, sites)) // 4
        # What a bucket sends, and what it receives in its passes; and one that is being summed.
        messages = sites + 1 if self._to_all(sites) else 3 * sites + 1
        return size + messages * message * min(-(-numel // max(1, size)), buckets.at_most) if numel else 0

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        wire = ByteCollectives(manager, of.now)
        buckets = self._buckets(values.numel(), wire.sites)
        parts = values.split(buckets.elements) if values.numel() else ()
        lost = residual.split(buckets.elements) if residual is not None and parts else [None] * len(parts)
        reduce_bucket = self._sum_of_all if self._to_all(wire.sites) else self._sum_by_owners
        if wire.sites == 2 and not self._always_to_all:
            reduce_bucket = self._sum_with_peer
        places = enumerate(zip(parts, lost, strict=True))
        overlap(
            wire,
            (reduce_bucket(wire, part, part_lost, place, of) for place, (part, part_lost) in places),
            buckets.at_most,
        )
        self._traffic += wire.traffic

    def _to_all(self, sites: int) -> bool:
        return self._always_to_all or sites <= 2

    def _buckets(self, numel: int, sites: int) -> Buckets:
        """Of whole shards, so that nothing but the last bucket needs padding."""
        unit = self._codec.granularity * (1 if self._to_all(sites) else sites)
        return Buckets.of(numel, self._bucket_elements, unit)

    def _shard(self, numel: int, sites: int) -> int:
        """Elements a message carries for a bucket of ``numel``."""
        whole = numel if self._to_all(sites) else -(-numel // sites)
        return -(-whole // self._codec.granularity) * self._codec.granularity

    def _sum_of_all(
        self, wire: ByteCollectives, values: torch.Tensor, residual: torch.Tensor | None, place: int, of: RoundFacts
    ) -> MessagesInTurn:
        padded = _padded(values, self._shard(values.numel(), wire.sites))
        message = self._encode(padded[None], residual)
        received, messages = wire.gather(message[0], place)
        yield messages
        self._combine(received.to(values.device), of, padded, place)
        if padded is not values:
            values.copy_(padded[: values.numel()])

    def _sum_with_peer(
        self, wire: ByteCollectives, values: torch.Tensor, residual: torch.Tensor | None, place: int, of: RoundFacts
    ) -> MessagesInTurn:
        (peer,) = wire.others
        padded = _padded(values, self._shard(values.numel(), 2))
        (message,) = self._encode(padded[None], residual, in_place=True)
        theirs = torch.empty_like(message, device=wire.device)
        yield wire.swap({peer: message.to(wire.device)}, {peer: theirs}, place)
        # Both sites add two decoded values, whose order does not matter.
        self._codec.accumulate(theirs.to(values.device), padded)
        if padded is not values:
            values.copy_(padded[: values.numel()])

    def _sum_by_owners(
        self, wire: ByteCollectives, values: torch.Tensor, residual: torch.Tensor | None, place: int, of: RoundFacts
    ) -> MessagesInTurn:
        shard = self._shard(values.numel(), wire.sites)
        shards = _padded(values, wire.sites * shard).view(wire.sites, shard)
        received, messages = wire.exchange(self._encode(shards, residual), 2 * place)
        yield messages
        total = torch.empty(shard, dtype=torch.float32, device=values.device)
        self._codec.combine(received.to(values.device), total)
        own = None if residual is None else residual[wire.rank * shard :][:shard]
        received, messages = wire.gather(self._encode_sum(total, own), 2 * place + 1)
        yield messages
        for part, row in zip(shards, received.to(values.device), strict=True):
            self._codec.decode(row, part)
        if values.numel() != shards.numel():
            values.copy_(shards.view(-1)[: values.numel()])

    def _encode(
        self, shards: torch.Tensor, residual: torch.Tensor | None = None, in_place: bool = False
    ) -> torch.Tensor:
        """The messages of ``shards [count, elements]``; what the codec takes away goes into the residual.

        With a residual or ``in_place`` the shards become what the messages say.
        """
        size = self._codec.wire_bytes(shards.shape[1])
        message = torch.empty(len(shards), size, dtype=torch.uint8, device=shards.device)
        if residual is None:
            encode = self._codec.encode_in_place if in_place else self._codec.encode
            for part, row in zip(shards, message, strict=True):
                encode(part, row)
            return message
        fits = residual.numel() == shards.numel()
        lost = residual.view_as(shards) if fits else torch.empty_like(shards)
        for part, row, lost_part in zip(shards, message, lost, strict=True):
            self._codec.encode_in_place(part, row, lost_part)
        if not fits:
            residual.copy_(lost.view(-1)[: residual.numel()])
        return message

    def _encode_sum(self, total: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The message of a sum; what the codec takes away is added to the residual."""
        if residual is None:
            return self._encode(total[None])[0]
        lost = torch.empty_like(total)
        message = self._encode(total[None], lost)[0]
        residual.add_(lost[: residual.numel()])
        return message

    def _combine(self, messages: torch.Tensor, of: RoundFacts, out: torch.Tensor, place: int) -> None:
        """Overwrite ``out`` with what all sites' messages of a bucket come to, where every site gets them all."""
        self._codec.combine(messages, out)


def _padded(values: torch.Tensor, numel: int) -> torch.Tensor:
    """With zeros to a size; the values themselves if they have it."""
    if values.numel() == numel:
        return values
    padded = values.new_zeros(numel)
    padded[: values.numel()] = values
    return padded


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

    def _combine(self, messages: torch.Tensor, of: RoundFacts, out: torch.Tensor, place: int) -> None:
        if not contributing(of.weights):
            out.zero_()
            return
        torch.mul(self._aggregate(self._contributions(messages, of, out)), math.fsum(of.weights), out=out)

    def _contributions(self, messages: torch.Tensor, of: RoundFacts, out: torch.Tensor) -> torch.Tensor:
        """What the sites that give something have given, decoded."""
        contributors = contributing(of.weights)
        values = out.new_empty(len(contributors), out.numel())
        for rank, row in zip(contributors, values, strict=True):
            self._codec.decode(messages[rank], row)
        return values


class WholeReduction(ElementwiseReduction):
    """An aggregate that sees this rank's shards of whole contributions: all buckets are gathered first.

    Args:
        codec: how values travel.
        bucket_elements: largest message handed to the wire at once.
        combine: the aggregate of this rank's shards; sums over the ranks of the site with its second argument.
    """

    cuts_anywhere = False
    sums_over_ranks = True

    def __init__(
        self, codec: Codec, bucket_elements: int, combine: Callable[[torch.Tensor, RankSum], torch.Tensor]
    ) -> None:
        super().__init__(codec, bucket_elements, _first)
        self._whole = combine
        self._gathered: dict[int, torch.Tensor] = {}

    def scratch_elements(self, numel: int, sites: int) -> int:
        return sites * numel + super().scratch_elements(numel, sites)

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        self._gathered.clear()
        super().reduce(manager, values, of, residual)
        contributors = contributing(of.weights)
        if contributors:
            # A rank without elements has part in the sums over the ranks all the same.
            parts = [self._gathered[place] for place in sorted(self._gathered)]
            parts = parts or [values.new_empty(len(contributors), 0)]
            gathered = torch.cat(parts, dim=1)[:, : values.numel()]
            self._gathered.clear()
            values.copy_(self._whole(gathered, of.rank_sum).mul_(math.fsum(of.weights)))

    def _combine(self, messages: torch.Tensor, of: RoundFacts, out: torch.Tensor, place: int) -> None:
        self._gathered[place] = self._contributions(messages, of, out)


def _first(contributions: torch.Tensor) -> torch.Tensor:
    """Stands for the aggregate until all of the contributions are there."""
    return contributions[0]


def contributing(weights: Sequence[float]) -> list[int]:
    """Ranks of the sites that give something."""
    return [rank for rank, weight in enumerate(weights) if weight > 0]
