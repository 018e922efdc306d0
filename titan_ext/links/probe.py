"""Measuring a link: one side answers, the other asks for its round-trip time and fills it for some seconds.

An answering side takes a byte and returns it, or takes a stream and returns how much of it came. Nothing that arrives is
kept or looked at.
"""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from titan_ext.errors import RunError, UserError
from titan_ext.links.link import Link
from titan_ext.links.tcp import PAYLOAD_SHARE

_PINGS = 10
_CONNECTIONS = 8  # so that no window holds the rate down
_SECONDS = 3.0
_PATIENCE_SECONDS = 10.0
_CHUNK = 2**18
_ECHO, _STREAM = b"e", b"s"
_COUNT = struct.Struct("!Q")


@contextmanager
def answering(port: int, host: str = "") -> Iterator[int]:
    """Answer probes on a port, 0 for a free one, until the block ends; yields the port.

    Raises:
        UserError: the port cannot be had.
    """
    try:
        server = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--answer {port}: {error}") from None
    thread = threading.Thread(target=_serve, args=(server,), daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def measure(address: str, seconds: float = _SECONDS) -> Link:
    """The link to where ``answering`` runs, in the direction from here to there.

    Args:
        address: ``host:port``.
        seconds: for how long to fill the link.

    Raises:
        UserError: the address cannot be read.
        RunError: nobody answers there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--probe-link {address}: must be A-B=HOST:PORT, where `titan-ext plan --answer PORT` runs")
    where = (host.strip("[]"), int(port))
    try:
        rtt = _round_trip(where)
        return Link(_fill(where, seconds) * 8 / PAYLOAD_SHARE, rtt)
    except OSError as error:
        raise RunError(f"--probe-link {address}: {error}; run `titan-ext plan --answer {port}` there") from None


def _round_trip(where: tuple[str, int]) -> float:
    with _connect(where) as connection:
        times = []
        for _ in range(_PINGS):
            started = time.perf_counter()
            connection.sendall(_ECHO)
            if connection.recv(1) != _ECHO:
                raise ConnectionError("the other side hung up")
            times.append(time.perf_counter() - started)
    return min(times)


def _fill(where: tuple[str, int], seconds: float) -> float:
    """Bytes a second that arrive over several connections."""
    with _connect(where):  # there, before the clock starts
        started = time.perf_counter()
        arrived = [0] * _CONNECTIONS
        failures: list[OSError] = []

        def send(place: int) -> None:
            try:
                with _connect(where) as connection:
                    connection.sendall(_STREAM)
                    while time.perf_counter() - started < seconds:
                        connection.sendall(bytes(_CHUNK))
                    connection.shutdown(socket.SHUT_WR)
                    arrived[place] = _COUNT.unpack(_receive(connection, _COUNT.size))[0]
            except OSError as error:
                failures.append(error)

        threads = [threading.Thread(target=send, args=(place,)) for place in range(_CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return sum(arrived) / (time.perf_counter() - started)


def _connect(where: tuple[str, int]) -> socket.socket:
    connection = socket.create_connection(where, timeout=_PATIENCE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("the other side hung up")
        received += part
    return received


def _serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # closed
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    try:
        with connection:
            connection.settimeout(_PATIENCE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while (asked := connection.recv(1)) == _ECHO:
                connection.sendall(_ECHO)
            if asked == _STREAM:
                count, space = 0, bytearray(_CHUNK)
                while size := connection.recv_into(space):
                    count += size
                connection.sendall(_COUNT.pack(count))
    except OSError:
        pass  # who asked has gone
