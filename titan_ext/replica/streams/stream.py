"""One connection to a peer, with the chunk that it is sending and the one that it is receiving."""

import contextlib
import socket

from titan_ext.replica.streams.distance import frame_bytes_sent
from titan_ext.replica.streams.transfer import Chunk, Transfer

_NOT_SENT_BYTES = 64 * 1024
"""A connection takes the next chunk when the kernel holds less than this of the last one that TCP has not sent yet:
what lies there could no longer go over a connection that is free."""
_TCP_NOTSENT_LOWAT = 25


class Stream:
    """A non-blocking connection.

    Args:
        connection: connected.
        peer: rank of the site at its other end.
    """

    def __init__(self, connection: socket.socket, peer: int) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # Linux alone
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _NOT_SENT_BYTES)
        self.socket, self.peer = connection, peer
        self.reading, self.writing, self.has_ended = True, False, False
        self.transfer: Transfer | None = None
        """What it is sending a chunk of."""
        self.chunk: Chunk | None = None
        """What it is receiving."""
        self.target: memoryview | None = None
        """Where the rest of that goes."""
        self._into: Transfer | None = None
        self._header = bytearray(Chunk.layout.size)
        self._header_bytes = 0
        self._out: list[memoryview] = []
        self._out_bytes = 0
        self._closed_wire_bytes = 0

    # -- out -----------------------------------------------------------------------------------

    @property
    def is_sending(self) -> bool:
        """Whether it has a chunk that is not with the kernel yet."""
        return bool(self._out)

    def give(self, transfer: Transfer, chunk: Chunk) -> None:
        """Let it send a chunk."""
        self.transfer, self._out_bytes = transfer, chunk.size
        self._out = [memoryview(chunk.pack()), transfer.buffer[chunk.start : chunk.start + chunk.size]]

    def write(self) -> int:
        """Send what the kernel takes; returns how many bytes that was."""
        try:
            count = left = self.socket.sendmsg(self._out)
        except BlockingIOError:
            return 0
        while self._out and left >= len(self._out[0]):
            left -= len(self._out.pop(0))
        if self._out:
            self._out[0] = self._out[0][left:]
        else:
            transfer, self.transfer = self.transfer, None
            transfer.moved(self._out_bytes)
        return count

    # -- in ------------------------------------------------------------------------------------

    def read_header(self) -> bool:
        """Whether the header of a chunk is there."""
        if self.chunk is not None:
            return True  # it was there, and the place for its bytes was not
        count = self._read_into(memoryview(self._header)[self._header_bytes :])
        self._header_bytes += count
        if self._header_bytes < len(self._header):
            return False
        self.chunk, self._header_bytes = Chunk.unpack(self._header), 0
        return True

    def aim(self, transfer: Transfer) -> None:
        """Receive the chunk into its place."""
        self._into = transfer
        self.target = transfer.buffer[self.chunk.start : self.chunk.start + self.chunk.size]

    def read_body(self) -> int:
        """Receive what is there; how many bytes that was. With the last one the ``target`` is empty."""
        count = self._read_into(self.target)
        self.target = self.target[count:]
        return count

    def finish_chunk(self) -> Transfer:
        """What the chunk belonged to, of which so much less is left."""
        transfer, chunk = self._into, self.chunk
        self._into = self.chunk = self.target = None
        transfer.moved(chunk.size)
        return transfer

    def _read_into(self, place: memoryview) -> int:
        try:
            count = self.socket.recv_into(place)
        except BlockingIOError:
            return 0
        self.has_ended |= count == 0
        return count

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the connection; the other end learns of it at once."""
        self._closed_wire_bytes = self.wire_bytes()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def wire_bytes(self) -> int:
        """Bytes of frames that it has sent, repetitions included; 0 where the kernel does not say."""
        return self._closed_wire_bytes or frame_bytes_sent(self.socket)
