"""A small server that each site's doctor runs for the others, and the doctors' meeting at the lighthouse.

Doctors find each other by heartbeats whose replica id says where a doctor listens. They never ask for a quorum. While a
run goes on they send none: a new run's first quorum would wait for whoever sends heartbeats.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from titan_ext.replica.authenticated_http import AuthenticatedConnection, AuthenticatedHandler, AuthenticatedServer
from titan_ext.replica.membership.lighthouse_page import read_lighthouse_page
from titan_ext.replica.membership.shared_secret import Secret

OF = "doctor"
_MARK = "titan_ext_doctor|"
_ALIVE_SECONDS = 4.0
_MOST_BYTES = 64 * 2**20
_BEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Peer:
    """Another site's doctor."""

    name: str
    host: str
    port: int


class Probe(AuthenticatedServer):
    """Answers other doctors.

    Args:
        port: 0 takes a free one.
        about: what this site says of itself; ``/hello`` adds the time.
        others: where the others' doctors are; only those are dialled back.
        secret: the run's.
    """

    def __init__(
        self, port: int, about: Mapping[str, Any], others: Callable[[], Mapping[str, Peer]], secret: Secret | None
    ) -> None:
        self.about, self.others = about, others
        self.done: set[str] = set()
        super().__init__("", port, _Handler, of=OF, secret=secret)


class _Handler(AuthenticatedHandler):
    """``/hello``, ``/bytes?count=``, ``/back?name=`` (can you reach me?), ``/done?name=``."""

    server: Probe

    def answer(self, path: str, query: Mapping[str, list[str]]) -> None:
        """As ``AuthenticatedHandler.answer``."""
        value = next(iter(query.values()), [""])[0]
        if path == "/hello":
            self._send({**self.server.about, "time": time.time()})
        elif path == "/bytes" and value.isdecimal() and int(value) <= _MOST_BYTES:
            self.send(200, bytes(int(value)), "application/octet-stream")
        elif path == "/back" and (asker := self.server.others().get(value)) is not None:
            self._send({"problem": dial(asker.host, asker.port)[1]})
        elif path == "/done":
            self.server.done.add(value)
            self._send({})
        else:
            self.send(404, b"", "text/plain")

    def _send(self, value: Mapping[str, Any]) -> None:
        self.send(200, json.dumps(value).encode(), "application/json")


def dial(host: str, port: int, seconds: float = 5.0) -> tuple[float | None, str | None]:
    """Connect; seconds that it took, or why it did not work."""
    import socket

    started = time.monotonic()
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return time.monotonic() - started, None
    except OSError as error:
        return None, error.strerror or str(error) or "no answer"


class Meeting:
    """Sends this doctor's heartbeats, and sees the others'.

    Args:
        lighthouse: its URL.
        name: of this site.
    """

    def __init__(self, lighthouse: str, name: str) -> None:
        self._lighthouse, self._name = lighthouse, name
        self._id = ""
        self._seen: dict[str, Peer] = {}
        self._over = threading.Event()

    def begin(self, host: str, port: int) -> None:
        """Tell the others where this doctor listens, until the end."""
        self._id = f"{_MARK}{quote(self._name, safe='')}|{host}|{port}|{secrets.token_hex(4)}"
        threading.Thread(target=self._beat, daemon=True, name="titan_ext-doctor").start()

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def wait_for(self, names: set[str], seconds: float) -> dict[str, Peer]:
        """The other doctors, once all ``names`` are there or the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.others()
            if names <= found.keys() or time.monotonic() > deadline:
                return found
            time.sleep(_BEAT_SECONDS / 2)

    def others(self) -> dict[str, Peer]:
        """Doctors of other sites that have been heard of: a busy machine may be late with a heartbeat."""
        try:
            heartbeats = read_lighthouse_page(self._lighthouse).heartbeats
        except OSError:
            return dict(self._seen)
        for peer in [_parse(each) for each, age in heartbeats.items() if age < _ALIVE_SECONDS]:
            if peer is not None and peer.name != self._name:
                self._seen[peer.name] = peer
        return dict(self._seen)

    def _beat(self) -> None:
        from datetime import timedelta

        from torchft.coordination import LighthouseClient

        client = None
        while not self._over.is_set():
            try:
                client = client or LighthouseClient(self._lighthouse, connect_timeout=timedelta(seconds=5))
                client.heartbeat(self._id)
            except RuntimeError:
                client = None
            self._over.wait(_BEAT_SECONDS)


def _parse(replica_id: str) -> Peer | None:
    if not replica_id.startswith(_MARK):
        return None
    name, host, port, _ = replica_id.removeprefix(_MARK).split("|")
    return Peer(unquote(name), host, int(port))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What was measured towards another doctor."""

    about: Mapping[str, Any]
    round_trip_seconds: float
    bits_per_second: float
    """From there to here, over one connection."""
    skew_seconds: float
    """How far its clock is ahead."""
    mtu: int | None
    problem_back: str | None
    """Why it cannot reach this site."""


def measure(peer: Peer, own_name: str, secret: Secret | None) -> Link:
    """Ask and measure.

    Raises:
        OSError: it cannot be reached, or does not hold the secret.
    """
    connection = AuthenticatedConnection(peer.host, peer.port, secret, of=OF, seconds=60.0)
    try:
        _ask(connection, "/hello")
        trips = []
        for _ in range(5):
            started, at = time.monotonic(), time.time()
            about = _ask(connection, "/hello")
            seconds = time.monotonic() - started
            trips.append((seconds, about["time"] - at - seconds / 2))
        seconds, skew = min(trips)
        rate = _rate(connection)
        return Link(
            about=about,
            round_trip_seconds=seconds,
            bits_per_second=rate,
            skew_seconds=skew,
            mtu=_path_mtu(connection),
            problem_back=_ask(connection, f"/back?name={quote(own_name, safe='')}")["problem"],
        )
    finally:
        connection.close()


def say_done(peer: Peer, own_name: str, secret: Secret | None) -> None:
    """Tell another doctor that this one needs it no more."""
    connection = AuthenticatedConnection(peer.host, peer.port, secret, of=OF, seconds=10.0)
    try:
        _ask(connection, f"/done?name={quote(own_name, safe='')}")
    except OSError:
        pass  # it has gone already
    finally:
        connection.close()


def _rate(connection: AuthenticatedConnection) -> float:
    """Bits a second: of as many bytes as take about two seconds."""
    size, rate = 2**18, 0.0
    while size <= _MOST_BYTES:
        started = time.monotonic()
        connection.get(f"/bytes?count={size}")
        seconds = max(1e-6, time.monotonic() - started)
        rate = 8 * size / seconds
        if seconds > 1.0:
            break
        size *= 8 if seconds < 0.1 else 2
    return rate


def _ask(connection: AuthenticatedConnection, path: str) -> dict[str, Any]:
    found = connection.get(path)
    if found is None:
        raise OSError("answers, but not as a doctor")
    return json.loads(found[1])


def _path_mtu(connection: AuthenticatedConnection) -> int | None:
    """What Linux knows of the way: the largest packet without fragmentation."""
    import socket

    ip_mtu, ipv6_mtu = 14, 24
    own = connection.socket()
    try:
        if own.family == socket.AF_INET6:
            return own.getsockopt(socket.IPPROTO_IPV6, ipv6_mtu)
        return own.getsockopt(socket.IPPROTO_IP, ip_mtu)
    except (OSError, AttributeError):
        return None
