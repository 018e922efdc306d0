"""How the sites of a group find each other and connect: several connections for each pair."""

import contextlib
import json
import secrets
import socket
import struct
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store

from titan_ext.replica.streams.distance import round_trip_seconds, streams_for
from titan_ext.semi_sync.wire.link import MOST_STREAMS

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"!{_TOKEN_BYTES}sIII")  # the token, who connects, which of its connections this is, of how many


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a site takes connections, and what shows that one is meant for this group."""

    host: str
    port: int
    token: bytes
    streams: int
    """Connections that the site wants to each peer; 0: as many as the distance asks for."""

    def to_json(self) -> str:
        return json.dumps([self.host, self.port, self.token.hex(), self.streams])

    @classmethod
    def from_json(cls, text: bytes | str) -> "_Address":
        host, port, token, streams = json.loads(text)
        return cls(host, port, bytes.fromhex(token), streams)


def connect_sites(
    store: Store, rank: int, world_size: int, *, hostname: str, streams: int, timeout: timedelta
) -> dict[int, list[socket.socket]]:
    """Connections to every other site of a group, by its rank; all sites call this.

    Of a pair the site of higher rank connects, and says how many connections there will be: the larger of the two numbers
    asked for, or, where both leave it open, what the distance that it measures asks for.

    Args:
        store: for this group alone.
        rank: of this site.
        world_size: sites.
        hostname: name or address under which the others reach this one.
        streams: connections to each; 0: by the distance.
        timeout: for all of it.

    Raises:
        RuntimeError, OSError: a site did not come in time, or cannot be reached.
    """
    if world_size == 1:
        return {}
    deadline = time.monotonic() + timeout.total_seconds()
    token = secrets.token_bytes(_TOKEN_BYTES)
    with _listen(hostname) as server:
        own = _Address(hostname, server.getsockname()[1], token, streams)
        store.set(f"streams/{rank}", own.to_json())
        accepting = _Acceptor(server, token, range(rank + 1, world_size), deadline)
        try:
            connected = _connect_all(store, range(rank), rank, own, world_size - 1, timeout, deadline)
            return connected | accepting.result()
        except BaseException:
            accepting.cancel()
            raise


def _listen(hostname: str) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(hostname, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address, family=family, backlog=256)


def _connect_all(
    store: Store, peers: range, rank: int, own: _Address, others: int, timeout: timedelta, deadline: float
) -> dict[int, list[socket.socket]]:
    if not peers:
        return {}
    keys = [f"streams/{peer}" for peer in peers]
    store.wait(keys, timeout)
    addresses = [_Address.from_json(text) for text in store.multi_get(keys)]
    with ThreadPoolExecutor(len(addresses)) as pool:
        connected = pool.map(lambda theirs: _connect(theirs, own, rank, others, deadline), addresses)
        return dict(zip(peers, connected, strict=True))


def _connect(theirs: _Address, own: _Address, rank: int, others: int, deadline: float) -> list[socket.socket]:
    def connection(index: int, count: int) -> socket.socket:
        made = socket.create_connection((theirs.host, theirs.port), timeout=max(0.001, deadline - time.monotonic()))
        made.sendall(_HELLO.pack(theirs.token, rank, index, count) if count else b"")
        return made

    first = connection(0, 0)
    count = max(own.streams, theirs.streams) or streams_for(round_trip_seconds(first), others)
    first.sendall(_HELLO.pack(theirs.token, rank, 0, count))
    with ThreadPoolExecutor(count) as pool:
        return [first, *pool.map(lambda index: connection(index, count), range(1, count))]


class _Acceptor:
    """Takes connections, on a thread of its own, until each peer has made all of its own.

    Args:
        server: listens.
        token: what a connection has to show first; others are ended.
        peers: ranks that will connect.
        deadline: of ``time.monotonic``.
    """

    def __init__(self, server: socket.socket, token: bytes, peers: range, deadline: float) -> None:
        self._server, self._token, self._deadline = server, token, deadline
        self._missing: dict[int, int | None] = dict.fromkeys(peers)
        """Connections that each peer has still to make; None while it has made none."""
        self._made: defaultdict[int, dict[int, socket.socket]] = defaultdict(dict)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="titan_ext-accept")
        self._future = self._pool.submit(self._accept_all)
        self._pool.shutdown(wait=False)

    def result(self) -> dict[int, list[socket.socket]]:
        """All connections, once they are there."""
        return self._future.result()

    def cancel(self) -> None:
        """Take no more."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(Exception):
            self._future.result()
        for made in self._made.values():
            for connection in made.values():
                connection.close()

    def _accept_all(self) -> dict[int, list[socket.socket]]:
        while any(missing != 0 for missing in self._missing.values()):
            self._server.settimeout(max(0.001, self._deadline - time.monotonic()))
            connection, _ = self._server.accept()
            if not self._admit(connection):
                connection.close()
        return {peer: [made[index] for index in sorted(made)] for peer, made in self._made.items()}

    def _admit(self, connection: socket.socket) -> bool:
        """Whether a connection is of this group."""
        connection.settimeout(max(0.001, self._deadline - time.monotonic()))
        try:
            token, rank, index, count = _HELLO.unpack(_receive(connection, _HELLO.size))
        except OSError:
            return False
        known = rank in self._missing and 0 < count <= MOST_STREAMS and index < count and index not in self._made[rank]
        if not known or not secrets.compare_digest(token, self._token):
            return False
        missing = self._missing[rank]
        self._missing[rank] = (count if missing is None else missing) - 1
        self._made[rank][index] = connection
        return True


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = connection.recv(size - len(received))
        if not piece:
            raise ConnectionError("it ended")
        received += piece
    return received
