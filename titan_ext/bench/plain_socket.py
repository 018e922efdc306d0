"""What the wire gives to nothing but a TCP socket: the mark for a reduction."""

import socket
import threading
import time

_PORT = 5099


class PlainSocket:
    """A site that sends to the next one of a ring while it receives from the one before.

    Args:
        site: index of this site.
        addresses: of all sites.
    """

    def __init__(self, site: int, addresses: list[str]) -> None:
        self._server = socket.create_server((addresses[site], _PORT))
        self._next = (addresses[(site + 1) % len(addresses)], _PORT)
        self._out: socket.socket | None = None
        self._in: socket.socket | None = None

    def connect(self) -> None:
        """Once all sites listen."""
        self._out = socket.create_connection(self._next)
        self._in, _ = self._server.accept()

    def exchange(self, num_bytes: int) -> float:
        """Seconds to send, and to receive, ``num_bytes``."""
        started = time.perf_counter()
        sending = threading.Thread(target=self._out.sendall, args=(bytes(num_bytes),))
        sending.start()
        space = bytearray(2**20)
        missing = num_bytes
        while missing > 0:
            count = self._in.recv_into(space, min(missing, len(space)))
            if not count:
                raise ConnectionError("the site before closed its connection")
            missing -= count
        sending.join()
        return time.perf_counter() - started
