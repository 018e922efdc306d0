"""Sockets that one thread reads or writes and another may shut down."""

import socket
import threading
import time
from collections.abc import Iterable


class OpenSockets:
    """Sockets in use, each with the time (of ``time.monotonic``) at which it is to be cut.

    A timeout of a socket bounds one call; a peer that sends a byte now and then never reaches it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}

    def __len__(self) -> int:
        return len(self._deadlines)

    def add(self, connection: socket.socket, deadline: float = float("inf")) -> None:
        with self._lock:
            self._deadlines[connection] = deadline

    def discard(self, connection: socket.socket) -> None:
        with self._lock:
            self._deadlines.pop(connection, None)

    def cut_expired(self) -> None:
        now = time.monotonic()
        with self._lock:
            expired = [connection for connection, deadline in self._deadlines.items() if deadline <= now]
        cut(expired)

    def cut_all(self) -> None:
        with self._lock:
            connections = list(self._deadlines)
        cut(connections)


def cut(connections: Iterable[socket.socket]) -> None:
    """Shut down connections that other threads read or write; those threads see an error or the end of the stream."""
    for connection in connections:
        try:
            # SSLSocket's own shutdown first forgets its encryption: the other thread would go on in the clear.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)
        except OSError:
            pass  # its thread has closed it, or the peer has
