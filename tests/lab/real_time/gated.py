"""Connections of a gated process, for tests; run as a script behind a gate with the name of one of its functions."""

import errno
import socket
import sys
import time
from hashlib import sha256

PATTERN = bytes(range(256))


def message(size: int) -> bytes:
    """So many bytes."""
    return (PATTERN * (size // 256 + 1))[:size]


def echo(host: str, port: int) -> None:
    """Print the seconds of a word there and back, on a connection that is there, and what the whole of an answer is."""
    with socket.create_connection((host, port)) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        started = time.perf_counter()
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        print(time.perf_counter() - started)
        connection.sendall(message(300_000))
        connection.shutdown(socket.SHUT_WR)
        digest = sha256()
        while part := connection.recv(65536):
            digest.update(part)
        print(digest.hexdigest())


def mapped(host: str, port: int) -> None:
    """Print what comes over an IPv6 socket, without blocking: as runtimes of other languages do it."""
    with socket.socket(socket.AF_INET6) as connection:
        connection.setblocking(False)
        found = connection.connect_ex((f"::ffff:{host}", port))
        assert found in (0, errno.EINPROGRESS), found
        connection.settimeout(10)
        connection.sendall(b"hi")
        print(connection.recv(2).decode())


def serve(host: str, port: int) -> None:
    """Return what comes, connection by connection, until it is killed; says when it listens."""
    with socket.create_server((host, port)) as server:
        print("listening", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                while part := connection.recv(65536):
                    connection.sendall(part)


def refused(host: str, port: int) -> None:
    """Print the name of the error."""
    try:
        socket.create_connection((host, port))
    except ConnectionRefusedError as error:
        print(errno.errorcode[error.errno])


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
