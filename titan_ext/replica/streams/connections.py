"""Messages to and from the sites of one quorum."""

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.distributed.distributed_c10d import AllreduceOptions, ReduceOp
from torch.futures import Future

from titan_ext.replica.streams.mover import Mover
from titan_ext.replica.streams.transfer import Transfer
from titan_ext.semi_sync.wire.manager import ReduceOperation

NAME = "titan_ext-streams"
"""Of the backend."""
_REDUCE_TAG = 2**31


class Patience:
    """How long a message may take."""

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self.in_quorum = False
        """Whether a quorum is being waited for: as long as it is, nobody knows whether the others have come."""


class Connections:
    """Messages over the connections of one quorum; once it is over, every message fails.

    Args:
        mover: has the connections.
        rank: of this site.
        size: sites of the quorum.
        patience: how long a message may take.
    """

    def __init__(self, mover: Mover, rank: int, size: int, patience: Patience) -> None:
        self._mover, self._rank, self._size, self._patience = mover, rank, size, patience
        self.control_bytes_sent = 0
        """Bytes of ``allreduce`` so far."""

    def getBackendName(self) -> str:
        return NAME

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work:
        """Send one contiguous tensor in host memory, which may not change until the work is done."""
        return _TransferWork(self, self._mover.send(dst_rank, tag, _bytes_of(tensors)), self._patience)

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work:
        """Receive into one contiguous tensor in host memory; messages of one tag come in their order."""
        return _TransferWork(self, self._mover.receive(src_rank, tag, _bytes_of(tensors)), self._patience)

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | ReduceOperation) -> Work:
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

    def close(self, error: Exception) -> None:
        """End the connections, so that no other site waits for what this one will not send; what waits here fails."""
        self._mover.close(error)

    @property
    def wire_bytes(self) -> int:
        """Bytes of frames sent so far, as the kernel tells: headers and repetitions included."""
        return self._mover.wire_bytes()


class _TransferWork(Work):
    """A message under way."""

    def __init__(self, connections: Connections, transfer: Transfer, patience: Patience) -> None:
        super().__init__()
        self._connections, self._transfer, self._patience = connections, transfer, patience

    def is_completed(self) -> bool:
        return self._transfer.is_over()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Raises RuntimeError if the message is lost or takes too long."""
        seconds = (timeout or self._patience.timeout).total_seconds()
        while not self._transfer.wait(seconds):
            if not self._patience.in_quorum:
                late = RuntimeError(f"a message took more than {seconds:g} s")
                self._connections.close(late)
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
