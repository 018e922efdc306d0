"""A message between two sites, and the chunks in which it travels."""

import struct
import threading
from dataclasses import dataclass

CHUNK_BYTES = 128 * 1024
"""Most that one connection is given of a message at a time."""
LEAST_CHUNK_BYTES = 14 * 1024
"""About what TCP sends over a connection at rest before it waits for an answer."""
SMALL_BYTES = 64 * 1024
"""Messages up to this size are sent before larger ones, and kept where they come before they are asked for."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What stands before the bytes of a chunk."""

    tag: int
    """Of the message."""
    count: int
    """How many messages of this tag came before it, from this sender to this receiver."""
    total: int
    """Bytes of the message."""
    start: int
    """Where the chunk belongs in it."""
    size: int
    """Bytes of the chunk."""

    layout = struct.Struct("!IIQQI")

    def pack(self) -> bytes:
        """The header on the wire."""
        return self.layout.pack(self.tag, self.count, self.total, self.start, self.size)

    @classmethod
    def unpack(cls, header: bytes | bytearray) -> "Chunk":
        """Raises RuntimeError if it describes no chunk."""
        chunk = cls(*cls.layout.unpack(header))
        if not 0 < chunk.size <= CHUNK_BYTES or chunk.start + chunk.size > chunk.total:
            raise RuntimeError(f"a peer sent what is no chunk of a message: {chunk}")
        return chunk


class Transfer:
    """One end of a message: over once all its bytes are with the kernel, or in their place.

    Args:
        peer: rank of the other site.
        tag: under which both ends know it.
        count: messages of this tag before it, in this direction.
        buffer: its bytes.
    """

    __slots__ = ("peer", "tag", "count", "buffer", "taken", "left", "error", "_over")

    def __init__(self, peer: int, tag: int, count: int, buffer: memoryview) -> None:
        self.peer, self.tag, self.count, self.buffer = peer, tag, count, buffer
        self.taken = 0
        """Bytes that connections have been given."""
        self.left = len(buffer)
        """Bytes that have not moved yet."""
        self.error: Exception | None = None
        self._over = threading.Event()

    @property
    def key(self) -> tuple[int, int, int]:
        return self.peer, self.tag, self.count

    @property
    def is_small(self) -> bool:
        return len(self.buffer) <= SMALL_BYTES

    def next_chunk(self, streams: int, waiting: int) -> Chunk:
        """The next bytes for a connection, so many that what waits is spread over all of them."""
        size = min(CHUNK_BYTES, max(LEAST_CHUNK_BYTES, waiting // streams), len(self.buffer) - self.taken)
        chunk = Chunk(self.tag, self.count, len(self.buffer), self.taken, size)
        self.taken += size
        return chunk

    def moved(self, count: int) -> None:
        """So many bytes less are left."""
        self.left -= count
        if self.left == 0:
            self._over.set()

    def fail(self, error: Exception) -> None:
        """It will never be complete."""
        if not self._over.is_set():
            self.error = error
            self._over.set()

    def is_over(self) -> bool:
        """Whether it arrived, or failed."""
        return self._over.is_set()

    def wait(self, seconds: float | None) -> bool:
        """Whether it is over within ``seconds``."""
        return self._over.wait(seconds)
