"""The sites' process group: messages over several connections for each pair, made anew with every new quorum."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch.distributed import Work
from torch.distributed.distributed_c10d import AllreduceOptions, ReduceOp
from torchft.process_group import ProcessGroup, create_store_client

from titan_ext.replica.streams.connections import NAME, Connections, Patience
from titan_ext.replica.streams.mover import Mover
from titan_ext.replica.streams.pace import Pace
from titan_ext.replica.streams.rendezvous import connect_sites


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
        self._patience = Patience(timeout)
        self._streams = streams
        self._pace = pace or Pace(0.0)
        self._rank, self._size = 0, 1
        self._connections: Connections | None = None
        self._before = (0, 0)
        """Bytes of frames and of control that earlier connections have sent."""

    # -- the group -------------------------------------------------------------------------------

    def configure(self, store_addr: str, replica_id: str, rank: int, world_size: int, *_: object, **__: object) -> None:
        """Connect to the other sites of a new quorum.

        Raises:
            RuntimeError, OSError: they cannot be reached.
        """
        self.abort()
        timeout = self._patience.timeout
        store = create_store_client(store_addr, timeout=timeout)
        connections = connect_sites(
            store, rank, world_size, hostname=self._hostname, streams=self._streams, timeout=timeout
        )
        self._rank, self._size = rank, world_size
        self._connections = Connections(Mover(connections, self._pace), rank, world_size, self._patience)

    def abort(self, errored: bool = True) -> None:
        """End the connections; what waits fails."""
        ended, self._connections = self._connections, None
        if ended is not None:
            ended.close(RuntimeError("the group was ended"))
            frames, control = self._before
            self._before = (frames + ended.wire_bytes, control + ended.control_bytes_sent)

    shutdown = abort

    def set_timeout(self, timeout: timedelta) -> None:
        """For messages from now on."""
        self._patience.timeout = timeout

    @contextmanager
    def in_quorum(self) -> Iterator[None]:
        """No message is late before the quorum is there."""
        self._patience.in_quorum = True
        try:
            yield
        finally:
            self._patience.in_quorum = False

    def getBackendName(self) -> str:
        return NAME

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    @property
    def connections(self) -> Connections | None:
        """Those of the quorum, if it has any."""
        return self._connections

    # -- messages --------------------------------------------------------------------------------

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work:
        """As ``Connections.send``."""
        return self._connected().send(tensors, dst_rank, tag)

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work:
        """As ``Connections.recv``."""
        return self._connected().recv(tensors, src_rank, tag)

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | ReduceOp) -> Work:
        """As ``Connections.allreduce``."""
        return self._connected().allreduce(tensors, opts)

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent so far, as the kernel tells: headers and repetitions included."""
        return self._before[0] + (self._connections.wire_bytes if self._connections is not None else 0)

    @property
    def control_bytes_sent(self) -> int:
        """Bytes of ``allreduce`` so far."""
        return self._before[1] + (self._connections.control_bytes_sent if self._connections is not None else 0)

    def _connected(self) -> Connections:
        if self._connections is None:
            raise RuntimeError("the sites are not connected")
        return self._connections
