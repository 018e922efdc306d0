"""The thread that moves messages over connections: all sends and receives of one group."""

import selectors
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

from titan_ext.replica.streams.pace import Pace
from titan_ext.replica.streams.stream import Stream
from titan_ext.replica.streams.transfer import SMALL_BYTES, Chunk, Transfer

_GRACE_SECONDS = 5.0
"""After the end of one connection to a peer, for its others to end too, or to bring what is still missing."""


class _Peer:
    """Another site: the connections to it, and what waits for them."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = list(streams)
        """Those that have not ended."""
        self.all_streams = tuple(streams)
        self.outgoing: tuple[deque[Transfer], deque[Transfer]] = (deque(), deque())
        """Small ones, which go first, and large ones, which keep their order."""
        self.waiting = 0
        """Bytes that no connection has been given yet."""
        self.broken_at: float | None = None
        """When a connection to it ended."""

    def next_transfer(self) -> Transfer | None:
        """What the next chunk is to be of."""
        for queue in self.outgoing:
            if queue:
                return queue[0]
        return None

    def take(self, transfer: Transfer) -> Chunk:
        """The next chunk of a transfer."""
        chunk = transfer.next_chunk(len(self.all_streams), self.waiting)
        self.waiting -= chunk.size
        if transfer.taken == len(transfer.buffer):
            self.outgoing[not transfer.is_small].popleft()
        return chunk


class Mover:
    """Moves messages to and from the other sites until it is closed, or something fails: then all that waits fails.

    Every chunk of a message goes over the connection that is free first, so a connection that is slow or loses packets
    delays no more than the chunk it has.

    No deadlock: a connection stops where a large message comes that nobody has asked for yet. Large messages are put on
    connections in the order in which they are given, so everything on it before that message has been read.

    Args:
        streams: connected and verified, for each peer.
        pace: what sending is held to; small messages do not wait for it.
    """

    def __init__(self, streams: Mapping[int, Sequence[socket.socket]], pace: Pace) -> None:
        self._peers = {peer: _Peer([Stream(each, peer) for each in sockets]) for peer, sockets in streams.items()}
        self._pace = pace
        self._orders: deque[tuple[bool, Transfer]] = deque()
        self._counts: defaultdict[tuple[bool, int, int], int] = defaultdict(int)
        self._lock = threading.Lock()
        self._expected: dict[tuple[int, int, int], Transfer] = {}
        self._early: dict[tuple[int, int, int], Transfer] = {}
        self._stopped: dict[tuple[int, int, int], list[Stream]] = {}
        self._held: list[Stream] = []
        self._resume_at = 0.0
        self.error: Exception | None = None
        self.sent = self.received = 0
        """Bytes of chunks so far, headers of ours included."""
        self._selector = selectors.DefaultSelector()
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        for peer in self._peers.values():
            for stream in peer.streams:
                self._selector.register(stream.socket, selectors.EVENT_READ, stream)
        self._thread = threading.Thread(target=self._run, daemon=True, name="titan_ext-streams")
        self._thread.start()

    # -- any thread ------------------------------------------------------------------------------

    def send(self, peer: int, tag: int, buffer: memoryview) -> Transfer:
        """Send a message; its bytes may not change until the transfer is over."""
        return self._order(True, peer, tag, buffer)

    def receive(self, peer: int, tag: int, buffer: memoryview) -> Transfer:
        """Receive the next message of this tag from a peer."""
        return self._order(False, peer, tag, buffer)

    def close(self, error: Exception) -> None:
        """End all connections; what waits fails with ``error``."""
        with self._lock:
            self.error = self.error or error
            self._ring()
        self._thread.join()

    def wire_bytes(self) -> int:
        """What the connections have sent: bytes, headers and repetitions of TCP and below, as far as the kernel tells."""
        return sum(stream.wire_bytes() for peer in self._peers.values() for stream in peer.all_streams)

    def _order(self, outgoing: bool, peer: int, tag: int, buffer: memoryview) -> Transfer:
        with self._lock:
            kind = (outgoing, peer, tag)
            transfer = Transfer(peer, tag, self._counts[kind], buffer)
            self._counts[kind] += 1
            if self.error is not None:
                transfer.fail(self.error)
            else:
                self._orders.append((outgoing, transfer))
                self._ring()
        return transfer

    def _ring(self) -> None:
        try:
            self._button.send(b"\0")
        except OSError:
            pass  # the thread has ended

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self.error is None:
                for key, events in self._selector.select(self._patience()):
                    if key.data is None:
                        self._bell.recv(4096)
                    else:
                        self._serve(key.data, events)
                self._take_orders()
                self._go_on()
        except Exception as error:  # noqa: BLE001 — whoever waits is told
            self.error = self.error or error
        self._end()

    def _patience(self) -> float | None:
        if self._held:
            return max(0.0, self._resume_at - time.monotonic())
        broken = any(peer.broken_at is not None and self._is_awaited(rank) for rank, peer in self._peers.items())
        return 0.5 if broken else None

    def _serve(self, stream: Stream, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(stream)
            if events & selectors.EVENT_WRITE and not stream.has_ended:
                self._write(stream)
        except OSError as error:
            self._ended(stream, error)

    def _take_orders(self) -> None:
        while self._orders:
            outgoing, transfer = self._orders.popleft()
            if transfer.left == 0:
                transfer.moved(0)
            elif outgoing:
                peer = self._peers[transfer.peer]
                peer.outgoing[not transfer.is_small].append(transfer)
                peer.waiting += transfer.left
                for stream in peer.streams:
                    self._watch(stream, writing=True)
            else:
                self._expect(transfer)
            self._check_lost(transfer.peer)

    def _expect(self, transfer: Transfer) -> None:
        self._expected[transfer.key] = transfer
        early = self._early.get(transfer.key)
        if early is not None and len(early.buffer) != len(transfer.buffer):
            raise _other_size(transfer, len(early.buffer))
        if early is not None and early.is_over():
            self._hand_over(early)
        for stream in self._stopped.pop(transfer.key, []):
            self._watch(stream, reading=True)

    def _watch(self, stream: Stream, *, reading: bool | None = None, writing: bool | None = None) -> None:
        """Change what is waited for at a connection."""
        if stream.has_ended:
            return
        before = stream.reading, stream.writing
        stream.reading = stream.reading if reading is None else reading
        stream.writing = stream.writing if writing is None else writing
        if (stream.reading, stream.writing) == before:
            return
        events = selectors.EVENT_READ * stream.reading | selectors.EVENT_WRITE * stream.writing
        if not any(before):
            self._selector.register(stream.socket, events, stream)
        elif events:
            self._selector.modify(stream.socket, events, stream)
        else:
            self._selector.unregister(stream.socket)

    # -- reading -----------------------------------------------------------------------------------

    def _read(self, stream: Stream) -> None:
        for _ in range(8):  # then the others
            if stream.target is None:
                if not stream.read_header():
                    break
                if not self._find_target(stream):
                    return
            count = stream.read_body()
            if not count:
                break
            self.received += count
            if not len(stream.target):
                self._arrived(stream)
        if stream.has_ended:
            self._ended(stream, None)

    def _find_target(self, stream: Stream) -> bool:
        """Where the chunk belongs that a connection has begun to bring; False if nobody has asked for it yet."""
        chunk = stream.chunk
        key = (stream.peer, chunk.tag, chunk.count)
        transfer = self._early.get(key) or self._expected.get(key)
        if transfer is None:
            if chunk.total > SMALL_BYTES:
                self._stopped.setdefault(key, []).append(stream)
                self._watch(stream, reading=False)
                return False
            transfer = self._early[key] = Transfer(*key, memoryview(bytearray(chunk.total)))
        if len(transfer.buffer) != chunk.total:
            raise _other_size(transfer, chunk.total)
        stream.aim(transfer)
        return True

    def _arrived(self, stream: Stream) -> None:
        transfer = stream.finish_chunk()
        if transfer.is_over() and transfer.key in self._expected:
            self._hand_over(transfer)

    def _hand_over(self, arrived: Transfer) -> None:
        """A message is complete: in its place, or where it came to before it was asked for."""
        expected = self._expected.pop(arrived.key)
        if expected is not arrived:
            del self._early[arrived.key]
            expected.buffer[:] = arrived.buffer
            expected.moved(expected.left)

    # -- writing -----------------------------------------------------------------------------------

    def _write(self, stream: Stream) -> None:
        """Some bytes of the chunk that a connection has, or of the next one."""
        peer = self._peers[stream.peer]
        if not stream.is_sending:
            transfer = peer.next_transfer()
            if transfer is None:
                self._watch(stream, writing=False)
                return
            wait = 0.0 if transfer.is_small else self._pace.seconds_to_wait()
            if wait > 0:
                self._resume_at = time.monotonic() + wait
                self._held.append(stream)
                self._watch(stream, writing=False)
                return
            stream.give(transfer, peer.take(transfer))
        count = stream.write()
        self.sent += count
        self._pace.spend(count)

    def _go_on(self) -> None:
        """After the pace has held them up."""
        if self._held and time.monotonic() >= self._resume_at:
            held, self._held = self._held, []
            for stream in held:
                self._watch(stream, writing=True)
        for rank, peer in self._peers.items():
            if peer.broken_at is not None and time.monotonic() > peer.broken_at + _GRACE_SECONDS:
                self._check_lost(rank, in_time=False)

    # -- ends --------------------------------------------------------------------------------------

    def _ended(self, stream: Stream, error: Exception | None) -> None:
        """A connection is at its end. That is a failure where something still has to come or go.

        A peer that has all it needs may be gone before we have read what it sent.
        """
        stream.has_ended = True
        if stream.reading or stream.writing:
            self._selector.unregister(stream.socket)
        stream.reading = stream.writing = False
        peer = self._peers[stream.peer]
        peer.streams.remove(stream)
        peer.broken_at = time.monotonic()
        cut = stream.is_sending or stream.chunk is not None
        stream.close()
        if cut:
            raise _lost(stream.peer, error)
        self._check_lost(stream.peer)

    def _check_lost(self, rank: int, in_time: bool = True) -> None:
        peer = self._peers[rank]
        if (not peer.streams or not in_time) and self._is_awaited(rank):
            raise _lost(rank, None)

    def _is_awaited(self, rank: int) -> bool:
        peer = self._peers[rank]
        return bool(peer.waiting) or any(key[0] == rank for key in self._expected)

    def _end(self) -> None:
        with self._lock:
            waiting = [transfer for _, transfer in self._orders]
            self._orders.clear()
        for peer in self._peers.values():
            waiting += [*peer.outgoing[0], *peer.outgoing[1]]
            waiting += [stream.transfer for stream in peer.streams if stream.transfer is not None]
            for stream in peer.streams:
                stream.close()
        for transfer in [*waiting, *self._expected.values()]:
            transfer.fail(self.error)
        self._selector.close()
        self._bell.close()
        self._button.close()


def _lost(peer: int, error: Exception | None) -> RuntimeError:
    return RuntimeError(f"the connection to site #{peer} ended{f': {error}' if error else ''}")


def _other_size(transfer: Transfer, size: int) -> RuntimeError:
    return RuntimeError(
        f"site #{transfer.peer} sent a message of {size} bytes where {len(transfer.buffer)} were expected"
    )
