"""The sites' process group: messages over several connections for each pair, reconfigured with every quorum."""

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.distributed.distributed_c10d import AllreduceOptions, ReduceOp
from torch.futures import Future
from torchft.process_group import ProcessGroup, create_store_client

from titan_ext.replica.streams.mover import Mover
from titan_ext.replica.streams.pace import Pace
from titan_ext.replica.streams.rendezvous import connect_sites
from titan_ext.replica.streams.transfer import Transfer

_REDUCE_TAG = 2**31


class StreamGroup(ProcessGroup):
    """torchft's reconfigurable process group over connections of our own.

    Gloo has one connection for each pair of ranks and collective at a time, and passes a ring's messages on from rank to
    rank. Here a message goes to a peer at once, spread over all connections to it. What fails at one site ends the group's
    connections, so that no other site goes on waiting for it.

    Args:
        hostname: name or address under which other sites reach this machine; it listens there.
        timeout: how long forming the group or a message may take.
        streams: connections for each pair of sites; 0: by their distance.
        pace: what sending is held to.
    """

    def __init__(self, hostname: str, timeout: timedelta, *, streams: int = 0, pace: Pace | None = None) -> None:
        super().__init__(0, 1)
        self._hostname = hostname
        self._timeout = timeout
        self._streams = streams
        self._pace = pace or Pace(0.0)
        self._rank, self._size = 0, 1
        self._mover: Mover | None = None
        self._bytes_before = 0
        """That earlier groups have sent."""
        self.control_bytes_sent = 0
        """Bytes of ``allreduce`` so far."""

    # -- the group -------------------------------------------------------------------------------

    def configure(self, store_addr: str, replica_id: str, rank: int, world_size: int, *_: object, **__: object) -> None:
        """Connect to the other sites of a new quorum.

        Raises:
            RuntimeError, OSError: they cannot be reached.
        """
        self.abort()
        store = create_store_client(store_addr, timeout=self._timeout)
        connections = connect_sites(
            store, rank, world_size, hostname=self._hostname, streams=self._streams, timeout=self._timeout
        )
        self._rank, self._size = rank, world_size
        self._mover = Mover(connections, self._pace)

    def abort(self, errored: bool = True) -> None:
        """End the connections; what waits fails."""
        mover, self._mover = self._mover, None
        if mover is not None:
            mover.close(RuntimeError("the group was ended"))
            self._bytes_before += mover.wire_bytes()

    shutdown = abort

    def set_timeout(self, timeout: timedelta) -> None:
        """For messages from now on."""
        self._timeout = timeout

    def getBackendName(self) -> str:
        return "titan_ext-streams"

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    # -- messages --------------------------------------------------------------------------------

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work:
        """Send one contiguous tensor in host memory, which may not change until the work is done."""
        return _TransferWork(self, self._connected().send(dst_rank, tag, _bytes_of(tensors)))

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work:
        """Receive into one contiguous tensor in host memory; messages of one tag come in their order."""
        return _TransferWork(self, self._connected().receive(src_rank, tag, _bytes_of(tensors)))

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | ReduceOp) -> Work:
        """The sum over the sites, in their order; for control messages: each site sends all of it to each other one."""
        (tensor,) = tensors
        if getattr(opts, "reduceOp", opts) != ReduceOp.SUM:
            raise RuntimeError("only sums")
        own = tensor.detach().cpu().contiguous()
        rows = [own if site == self._rank else torch.empty_like(own) for site in range(self._size)]
        others = [site for site in range(self._size) if site != self._rank]
        self.control_bytes_sent += own.nbytes * len(others)
        works = [self.send([own], site, _REDUCE_TAG) for site in others]
        works += [self.recv([rows[site]], site, _REDUCE_TAG) for site in others]
        return _SumWork(works, rows, tensor)

    def fail(self, error: Exception) -> None:
        """End the connections, so that the other sites do not wait for what this one will not send."""
        if self._mover is not None:
            self._mover.close(error)

    @property
    def timeout(self) -> timedelta:
        """Of a message."""
        return self._timeout

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent so far, as the kernel tells: headers and repetitions included."""
        return self._bytes_before + (self._mover.wire_bytes() if self._mover is not None else 0)

    def _connected(self) -> Mover:
        if self._mover is None:
            raise RuntimeError("the sites are not connected")
        return self._mover


class _TransferWork(Work):
    """A message under way."""

    def __init__(self, group: StreamGroup, transfer: Transfer) -> None:
        super().__init__()
        self._group, self._transfer = group, transfer

    def is_completed(self) -> bool:
        return self._transfer.is_over()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises RuntimeError if the message is lost or takes too long."""
        seconds = (timeout or self._group.timeout).total_seconds()
        if not self._transfer.wait(seconds):
            late = RuntimeError(f"a message took more than {seconds:g} s")
            self._group.fail(late)
            self._transfer.fail(late)
        if self._transfer.error is not None:
            raise RuntimeError(str(self._transfer.error)) from self._transfer.error
        return True

    def get_future(self) -> Future:
        return _completed(self, None)


class _SumWork(Work):
    """The sum of a small tensor, computed by who waits for it."""

    def __init__(self, works: list[Work], rows: list[torch.Tensor], out: torch.Tensor) -> None:
        super().__init__()
        self._works, self._rows, self._out = works, rows, out

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait()
        if self._rows:
            total = self._rows[0].clone()
            for row in self._rows[1:]:
                total.add_(row)
            self._out.copy_(total)
            self._rows = []
        return True

    def get_future(self) -> Future:
        return _completed(self, [self._out])


def _completed(work: Work, value: Any) -> Future:
    """A future of work that is waited for here."""
    future: Future = Future()
    try:
        work.wait()
        future.set_result(value)
    except RuntimeError as error:
        future.set_exception(error)
    return future


def _bytes_of(tensors: list[torch.Tensor]) -> memoryview:
    (tensor,) = tensors
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise RuntimeError("messages between sites are contiguous tensors in host memory")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
