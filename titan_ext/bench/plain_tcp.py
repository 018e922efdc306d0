"""What a link can do: plain TCP sockets, one or several for each pair of neighbours in a ring."""

import socket
import threading
import time

_FIRST_PORT = 5099


class PlainSockets:
    """A site that sends to the next one of a ring while it receives from the one before.

    Args:
        site: index of this site.
        addresses: of all sites.
        streams: connections to the next site.
        place: tells groups of sockets at one site apart.
    """

    def __init__(self, site: int, addresses: list[str], streams: int, place: int) -> None:
        port = _FIRST_PORT + place
        self._server = socket.create_server((addresses[site], port), backlog=streams)
        self._next = (addresses[(site + 1) % len(addresses)], port)
        self._streams = streams
        self._site, self._before = site, (site - 1) % len(addresses)
        self._out: list[socket.socket] = []
        self._in: list[socket.socket] = []

    def connect(self) -> None:
        """Once all sites listen."""
        self._out = [socket.create_connection(self._next) for _ in range(self._streams)]
        self._in = [self._server.accept()[0] for _ in range(self._streams)]

    def exchange(self, num_bytes: int, sender: int | None = None) -> float:
        """Seconds to send, and to receive, about ``num_bytes``; with a ``sender`` only that site does, to the next one."""
        each = num_bytes // self._streams
        sends, receives = ((sender is None or sender == site) for site in (self._site, self._before))
        started = time.perf_counter()
        work = [threading.Thread(target=out.sendall, args=(bytes(each),)) for out in self._out if sends]
        work += [threading.Thread(target=_receive, args=(connection, each)) for connection in self._in if receives]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        return time.perf_counter() - started


def _receive(connection: socket.socket, missing: int) -> None:
    space = bytearray(2**20)
    while missing > 0:
        count = connection.recv_into(space, min(missing, len(space)))
        if not count:
            raise ConnectionError("the site before closed its connection")
        missing -= count
