"""Lines and members that misbehave, as servers on a port of their own."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from urllib.parse import urlsplit

from titan_ext.replica.state_transfer.chunks import DIGEST_BYTES, MessageInfo

TAG = f'"{"0" * 32}"'


@contextmanager
def listening(serve: Callable[[socket.socket, int], None]) -> Iterator[str]:
    """The URL at which ``serve(connection, its number)`` answers, each connection in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def handle(connection: socket.socket, number: int) -> None:
            with connection:
                try:
                    serve(connection, number)
                except OSError:
                    pass  # the other end has left

        def accept() -> None:
            number = 0
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=handle, args=[connection, number], daemon=True).start()
                number += 1

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/state/"
        finally:
            server.shutdown(socket.SHUT_RDWR)


class Line:
    """A line to a member; what the member sends passes through ``tamper``.

    Args:
        url: of the member.
        tamper: from the connection's number, its bytes so far and the next ones to those that arrive,
            or None to break the connection.
    """

    def __init__(self, url: str, tamper: Callable[[int, int, bytes], bytes | None]) -> None:
        self._port = urlsplit(url).port
        self._tamper = tamper
        self.connections = 0
        self.bytes = 0
        self.requests = bytearray()

    def serve(self, client: socket.socket, number: int) -> None:
        self.connections += 1
        with socket.create_connection(("127.0.0.1", self._port)) as member:
            threading.Thread(target=self._ask, args=[client, member], daemon=True).start()
            seen = 0
            while data := member.recv(4096):
                passed = self._tamper(number, seen, data)
                if passed is None:
                    client.shutdown(socket.SHUT_WR)
                    return
                seen += len(data)
                self.bytes += len(passed)
                client.sendall(passed)

    def _ask(self, client: socket.socket, member: socket.socket) -> None:
        try:
            while data := client.recv(4096):
                self.requests += data
                member.sendall(data)
            member.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def answer(body: bytes, **changes: str) -> bytes:
    """What a member would answer whose message is ``body`` in one chunk, with other values of some headers."""
    headers = MessageInfo(TAG, len(body), max(1, len(body))).headers()
    headers["Content-Length"] = str(len(body) + DIGEST_BYTES)
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode() + body + sha256(body).digest()


def always(data: bytes) -> Callable[[socket.socket, int], None]:
    """A member that answers every request with ``data``."""

    def serve(connection: socket.socket, number: int) -> None:
        while connection.recv(65536):
            connection.sendall(data)

    return serve
