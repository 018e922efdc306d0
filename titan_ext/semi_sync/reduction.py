"""Summing a flat tensor over the sites of a quorum, in place, plainly or through a codec.

Gloo matches the collectives of two sites by their order alone. Every reduction therefore issues
them in an order that depends on nothing but sizes: ``start`` for all, then ``finish`` for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch.distributed import ReduceOp, Work
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from titan_ext.semi_sync.codec import Codec
from titan_ext.semi_sync.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.manager import ReplicaManager, wire_device


class Reduction(ABC):
    """One way to sum tensors over sites; holds no state between rounds."""

    @abstractmethod
    def wire_bytes(self, numel: int, sites: int) -> int:
        """Bytes that a rank sends (and receives) to sum ``numel`` elements over ``sites``."""

    @abstractmethod
    def start(self, manager: ReplicaManager, values: torch.Tensor, *, keep_sent: bool = False) -> "Running":
        """Begin to sum ``values`` (fp32 ``[numel]``); they may not be touched until it is finished."""


class Running(ABC):
    """A reduction under way."""

    sent: torch.Tensor | None = None
    """fp32 ``[numel]``: what the other sites read from this one's messages; None if exact or not asked for."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until the values hold the sum over the sites; errors are the manager's, never raised."""


class AllReduce(Reduction):
    """fp32 in buckets, each a ring all-reduce.

    Args:
        bucket_elements: largest message handed to the wire at once.
    """

    def __init__(self, bucket_elements: int) -> None:
        self._bucket_elements = bucket_elements

    def wire_bytes(self, numel: int, sites: int) -> int:
        return ring_all_reduce_bytes(4 * numel, sites)

    def start(self, manager: ReplicaManager, values: torch.Tensor, *, keep_sent: bool = False) -> Running:
        buckets = values.split(self._bucket_elements) if values.numel() else ()
        return _RunningAllReduce([manager.allreduce(bucket, reduce_op=ReduceOp.SUM) for bucket in buckets])


class _RunningAllReduce(Running):
    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def finish(self) -> None:
        for work in self._works:
            work.wait()


class CodedReduction(Reduction):
    """Messages of a codec, summed in fp32.

    A dense codec: each site is the owner of one shard of every bucket, gets the others' messages
    for it (all-to-all), sums them in fp32 and sends the coded sum to all (all-gather). The owner
    too takes the decoded message, so all sites hold the same bits. A sparse codec: every site gets
    every message and sums them in the order of the sites.
    """

    def __init__(self, codec: Codec, bucket_elements: int) -> None:
        self._codec = codec
        self._bucket_elements = -(-bucket_elements // codec.granularity) * codec.granularity

    def wire_bytes(self, numel: int, sites: int) -> int:
        passes = 1 if self._codec.sparse else 2
        sizes = [min(self._bucket_elements, numel - start) for start in range(0, numel, self._bucket_elements)]
        return sum(passes * (sites - 1) * self._codec.wire_bytes(self.shard_elements(size, sites)) for size in sizes)

    def shard_elements(self, numel: int, sites: int) -> int:
        """Elements a message carries for a bucket of ``numel``."""
        whole = numel if self._codec.sparse else -(-numel // sites)
        return -(-whole // self._codec.granularity) * self._codec.granularity

    def start(self, manager: ReplicaManager, values: torch.Tensor, *, keep_sent: bool = False) -> Running:
        running = _RunningCoded(manager, values, self._codec, keep_sent)
        for bucket in values.split(self._bucket_elements) if values.numel() else ():
            running.send(bucket, self.shard_elements(bucket.numel(), manager.num_participants()))
        return running


class _RunningCoded(Running):
    def __init__(self, manager: ReplicaManager, values: torch.Tensor, codec: Codec, keep_sent: bool) -> None:
        self._manager = manager
        self._values = values
        self._codec = codec
        self._sites = manager.num_participants()
        self._buckets: list[tuple[torch.Tensor, torch.Tensor, Work | None]] = []
        self.sent = torch.empty_like(values) if keep_sent else None
        self._start = 0
        self._wire = wire_device(manager)

    def send(self, bucket: torch.Tensor, shard: int) -> None:
        """Code a bucket and hand it to the wire."""
        copies = 1 if self._codec.sparse else self._sites
        padded = bucket.new_zeros(copies * shard)
        padded[: bucket.numel()] = bucket
        message = torch.stack([self._codec.encode(part) for part in padded.view(copies, shard)])
        if self.sent is not None:
            decoded = torch.cat([self._codec.decode(part) for part in message])
            self.sent[self._start : self._start + bucket.numel()] = decoded[: bucket.numel()]
            self._start += bucket.numel()
        message = message.to(self._wire)
        received = message.new_empty(self._sites, message.shape[1])
        work = self._issue(received, message, gather=self._codec.sparse)
        self._buckets.append((bucket, received, work))

    def finish(self) -> None:
        if not self._codec.sparse:
            self._sum_own_shards()
        for bucket, received, work in self._buckets:
            self._wait(work)
            parts = [self._decode(message) for message in received]
            if self._codec.sparse:
                total = parts[0]
                for part in parts[1:]:
                    total += part
            else:
                total = torch.cat(parts)
            bucket.copy_(total[: bucket.numel()])
        self._buckets = []

    def _sum_own_shards(self) -> None:
        summed = []
        for bucket, received, work in self._buckets:
            self._wait(work)
            total = self._decode(received[0])
            for message in received[1:]:
                total += self._decode(message)
            message = self._codec.encode(total).to(self._wire)
            gathered = torch.empty_like(received)
            summed.append((bucket, gathered, self._issue(gathered, message[None], gather=True)))
        self._buckets = summed

    def _decode(self, message: torch.Tensor) -> torch.Tensor:
        return self._codec.decode(message.to(self._values.device))

    def _issue(self, received: torch.Tensor, message: torch.Tensor, *, gather: bool) -> Work | None:
        if self._sites == 1:
            received.copy_(message)
            return None
        if self._manager.errored() is not None:
            received.zero_()
            return None
        group = self._manager._pg  # torchft's manager offers all-reduce alone
        try:
            if gather:
                return group.allgather([list(received.unbind())], [message[0]], AllgatherOptions())
            return group.alltoall_base(received, message, [], [], AllToAllOptions())
        except RuntimeError as error:
            self._manager.report_error(error)
            received.zero_()
            return None

    def _wait(self, work: Work | None) -> None:
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as error:
            self._manager.report_error(error)


def build_reduction(codec: Codec | None, bucket_bytes: int) -> Reduction:
    """The reduction of a codec; None is fp32."""
    elements = max(1, bucket_bytes // 4)
    return AllReduce(elements) if codec is None else CodedReduction(codec, elements)
