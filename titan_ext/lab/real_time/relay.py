"""Carries the bytes of the sites' connections to each other, as late as their links would.

A connection of a site to another one ends here, and goes on from here to where it was meant for. The relay takes no more
bytes from the sender than TCP would have under way, so the sender's own buffers fill as they would on a long link; it
hands them over when they are due.
"""

import contextlib
import heapq
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from titan_ext.lab.real_time.doorkeeper import Doorkeeper, Port
from titan_ext.lab.real_time.shaping import Flow, Shaper


class Relay:
    """A thread that carries bytes until it is closed.

    Args:
        shaper: the links.
        addresses: of the sites, in their order, and last that of the lighthouse.
        socket_path: at which the sites' gates announce themselves.
    """

    def __init__(self, shaper: Shaper, addresses: Sequence[str], socket_path: Path) -> None:
        self.shaper = shaper
        self._selector = selectors.DefaultSelector()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._calls: deque[Callable[[], None]] = deque()
        self._ends = False
        self._bell, self._button = socket.socketpair()
        self.watch(self._bell, selectors.EVENT_READ, lambda _: self._take_calls())
        self.doorkeeper = Doorkeeper(addresses, socket_path, lambda port: self._call(lambda: self._open_port(port)))
        self._thread = threading.Thread(target=self._run, daemon=True, name="titan_ext-relay")
        self._thread.start()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections."""
        self.doorkeeper.close()
        self._call(lambda: setattr(self, "_ends", True))
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # all are sockets
        self._selector.close()
        self._button.close()

    def partition(self, pair: Sequence[int], seconds: float) -> None:
        """Nothing passes between two sites for so long."""
        self._call(lambda: self.shaper.partition(pair, time.monotonic() + seconds))

    def _call(self, action: Callable[[], None]) -> None:
        """Have the thread do something."""
        self._calls.append(action)
        self._button.send(b"\0")

    # -- the thread ------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Call ``action`` at a time of ``time.monotonic``."""
        heapq.heappush(self._events, (when, next(self._order), action))

    def watch(self, file: socket.socket, events: int, action: Callable[[int], None]) -> None:
        """Call ``action`` with what a socket is ready for; without events no more."""
        known = file in self._selector.get_map()
        if known and events:
            self._selector.modify(file, events, action)
        elif known:
            self._selector.unregister(file)
        elif events:
            self._selector.register(file, events, action)

    def forget(self, file: socket.socket) -> None:
        """Wait for nothing at a socket any more."""
        self.watch(file, 0, lambda _: None)

    def _take_calls(self) -> None:
        self._bell.recv(4096)
        while self._calls:
            self._calls.popleft()()

    def _open_port(self, port: Port) -> None:
        def accept(_: int) -> None:
            with contextlib.suppress(OSError, IndexError):  # who wanted it is gone; nobody has asked for it
                near, _ = port.server.accept()
                Carried(self, near, port.expected.popleft(), port.source, port.target)

        self.watch(port.server, selectors.EVENT_READ, accept)

    def _run(self) -> None:
        while not self._ends:
            wait = max(0.0, self._events[0][0] - time.monotonic()) if self._events else None
            for key, ready in self._selector.select(wait):
                if key.fd in self._selector.get_map():  # else what came before has ended it
                    key.data(ready)
            now = time.monotonic()
            while self._events and self._events[0][0] <= now:
                heapq.heappop(self._events)[2]()


class Carried:
    """A connection: both its ends and both its directions.

    Args:
        relay: that carries it.
        near: to the site that has connected.
        far: to the one that it wants.
        source: place of the one.
        target: of the other.
    """

    def __init__(self, relay: Relay, near: socket.socket, far: socket.socket, source: int, target: int) -> None:
        self.relay, self.sockets = relay, (near, far)
        self.is_over = False
        shaper, now = relay.shaper, time.monotonic()
        there, back = shaper.flow(source, target), shaper.flow(target, source)
        # The other side's first byte may come once the handshake's last packet is there.
        self._ways = (_Way(self, near, far, there, now + there.link.rtt), _Way(self, far, near, back, now))
        for place, each in enumerate(self.sockets):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.rewatch(place)

    def rewatch(self, place: int) -> None:
        """Wait for what one end is wanted for."""
        if self.is_over:
            return
        incoming, outgoing = self._ways[place], self._ways[1 - place]
        events = selectors.EVENT_READ * incoming.reads | selectors.EVENT_WRITE * bool(outgoing.waiting)
        self.relay.watch(self.sockets[place], events, lambda ready: self._serve(incoming, outgoing, ready))

    def _serve(self, incoming: "_Way", outgoing: "_Way", ready: int) -> None:
        try:
            if ready & selectors.EVENT_READ:
                incoming.read()
            if ready & selectors.EVENT_WRITE and not self.is_over:
                outgoing.write()
        except OSError:
            self.fail(incoming.flow.link.rtt / 2)

    def fail(self, seconds: float) -> None:
        """One end is gone; the other learns of it after a while."""
        if not self.is_over:
            self.is_over = True
            for each in self.sockets:
                self.relay.forget(each)
            self.relay.at(time.monotonic() + seconds, self._reset)

    def has_ended(self) -> None:
        """A direction has; with the other one the connection is over."""
        if all(way.has_ended for way in self._ways) and not self.is_over:
            self.is_over = True
            for each in self.sockets:
                self.relay.forget(each)
                each.close()

    def place_of(self, end: socket.socket) -> int:
        """Which of the two ends it is."""
        return self.sockets.index(end)

    def _reset(self) -> None:
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()


class _Way:
    """One direction of a connection."""

    def __init__(
        self, carried: Carried, source: socket.socket, target: socket.socket, flow: Flow, opens_at: float
    ) -> None:
        self.flow, self.reads, self.has_ended = flow, False, False
        self.waiting: deque[memoryview] = deque()
        """What has arrived and the receiver has not taken."""
        self._carried, self._source, self._target = carried, source, target
        self._has_all = self._ends = False  # from the sender; for the receiver
        carried.relay.at(opens_at, self._resume)

    def read(self) -> None:
        """Take a chunk of what may be sent; the others take theirs before the next, or one would fill the queue for all."""
        now = time.monotonic()
        room = self.flow.room(now)
        if not room:
            self._pause(now)
            return
        try:
            chunk = self._source.recv(room)
        except BlockingIOError:
            return
        relay = self._carried.relay
        if chunk:
            relay.at(self.flow.send(len(chunk), now), lambda: self._arrive(chunk))
            return
        self._has_all = True
        self._set_reading(False)
        relay.at(self.flow.end(now), self._end)

    def write(self) -> None:
        """Hand over what has arrived."""
        taken = 0
        while self.waiting:
            try:
                size = self._target.send(self.waiting[0])
            except BlockingIOError:
                break
            taken += size
            self.waiting[0] = self.waiting[0][size:]
            if not self.waiting[0]:
                self.waiting.popleft()
        if taken:
            now = time.monotonic()
            self._carried.relay.at(now + self.flow.link.rtt / 2, lambda: self._acknowledge(taken))
        self._carried.rewatch(self._carried.place_of(self._target))
        if self._ends and not self.waiting:
            self._target.shutdown(socket.SHUT_WR)
            self.has_ended = True
            self._carried.has_ended()

    def _pause(self, now: float) -> None:
        """Stop reading; what is under way, or the end of the queue, lets it go on."""
        self._set_reading(False)
        if queued := self.flow.seconds_to_room(now):
            self._carried.relay.at(now + queued, self._resume)

    def _resume(self) -> None:
        if not self._carried.is_over and not self._has_all:
            self._set_reading(True)

    def _set_reading(self, reads: bool) -> None:
        if self.reads is not reads:
            self.reads = reads
            self._carried.rewatch(self._carried.place_of(self._source))

    def _arrive(self, chunk: bytes) -> None:
        if not self._carried.is_over:
            self.waiting.append(memoryview(chunk))
            self._try_to_write()

    def _end(self) -> None:
        if not self._carried.is_over:
            self._ends = True
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self.write()
        except OSError:
            self._carried.fail(self.flow.link.rtt / 2)

    def _acknowledge(self, size: int) -> None:
        self.flow.acknowledged(size, time.monotonic())
        self._resume()
