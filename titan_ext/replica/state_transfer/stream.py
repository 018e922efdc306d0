"""One connection to a member that serves shared state: asked again after every failure that may pass."""

import http.client
import logging
import math
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.chunks import DIGEST_BYTES, Announcement, chunk_digest, request_path
from titan_ext.replica.state_transfer.handshake import Client
from titan_ext.replica.state_transfer.sockets import OpenSockets

logger = logging.getLogger(__name__)

_ATTEMPTS = 8  # in a row without one good chunk; the pauses between them come to some ten seconds
_WRONG_ANSWERS = 3  # in a row: a digest that does not fit, or headers that make no sense
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 5.0
_CONNECT_SECONDS = 20.0
_SILENCE_SECONDS = 30.0  # after which a connection that was answering counts as broken
_REFUSED_CERTIFICATE = re.compile("ALERT.*(CERTIFICATE|UNKNOWN_CA)")

_NOT_PROVEN = "the member does not prove to hold this site's secret (replica.secret_file)"

# Where the message's bytes from start to stop are to be written.
Spaces = Callable[[int, int], Iterable[memoryview]]


class _Refused(OSError):
    pass


class Source:
    """What the connections of one transfer share: where to, until when, and whether it has failed."""

    def __init__(
        self, url: str, step: int, timeout: float, context: ssl.SSLContext | None, secret: Secret | None
    ) -> None:
        parts = urlsplit(url)
        wanted = "http" if context is None else "https"
        if parts.scheme != wanted or not parts.hostname or not parts.port:
            raise ValueError(
                f"shared state: a member serves it at {url}, where this site expects {wanted}: "
                "either all sites set replica.tls_certificate, tls_key and tls_authority, or none does"
            )
        self.step = step
        self.secret = secret
        self.failure: BaseException | None = None
        self.announcement: Announcement | None = None
        self._host, self._port, self._root = parts.hostname, parts.port, parts.path
        self._context = context
        self._deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._sockets = OpenSockets()

    def left(self, at_most: float = math.inf) -> float:
        """Seconds until the deadline; above 0, since 0 would make a socket non-blocking."""
        return max(0.001, min(at_most, self._deadline - time.monotonic()))

    def path(self, first: int, last: int) -> str:
        return self._root + request_path(self.step, first, last)

    def connect(self) -> http.client.HTTPConnection:
        timeout = self.left(_CONNECT_SECONDS)
        if self._context is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._context)
        connection.connect()
        self._sockets.add(connection.sock)
        if self.failure is not None:  # set before the sockets were cut, perhaps without this one
            self._sockets.cut_all()
        return connection

    def forget(self, connection: Any) -> None:
        self._sockets.discard(connection)

    def learn(self, announcement: Announcement) -> None:
        with self._lock:
            if self.announcement not in (None, announcement):
                raise ValueError("the member announces another message than before")
            self.announcement = announcement

    def stop(self, failure: BaseException) -> None:
        """End the transfer; the first failure is the one that counts."""
        with self._lock:
            self.failure = self.failure or failure
        self._stopped.set()
        self._sockets.cut_all()

    def pause(self, seconds: float) -> None:
        self._stopped.wait(min(seconds, self.left()))


class Stream:
    """One connection to the member, made again when it breaks."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._connection: http.client.HTTPConnection | None = None
        self._socket: Any = None
        self._client: Client | None = None
        self._key: bytes | None = None

    def take(self, first: int, last: int, spaces: Spaces) -> None:
        """Write the chunks ``first`` to ``last`` to their places; what is wrong there is overwritten or raised."""
        broken = wrong = 0
        while first <= last:
            try:
                for chunk in self._receive(first, last, spaces):
                    first, broken, wrong = chunk + 1, 0, 0
                continue
            except OSError as error:
                problem: Exception = error
                broken += 1
            except (ValueError, http.client.HTTPException) as error:
                problem = error
                wrong += 1
            self.close()
            if self._source.failure is not None:
                raise self._source.failure
            if wrong == _WRONG_ANSWERS:
                raise ValueError(f"shared state: chunk {first}, asked for {wrong} times: {problem!r}") from problem
            if broken == _ATTEMPTS or _is_final(problem):
                raise problem
            logger.warning("shared state: fetching chunk %d again (%r)", first, problem)
            self._source.pause(min(_PAUSE_SECONDS * 2.0 ** (broken + wrong), _LONGEST_PAUSE_SECONDS))

    def _receive(self, first: int, last: int, spaces: Spaces) -> Iterator[int]:
        """Ask once, and yield each chunk that has arrived whole."""
        response = self._ask(first, last)
        for chunk in range(first, last + 1):
            seen = chunk_digest(self._key, self._source.step, self._source.announcement, chunk)
            for space in spaces(*self._source.announcement.span(chunk)):
                _read(response, space)
                seen.update(space)
            sent = bytearray(DIGEST_BYTES)
            _read(response, memoryview(sent))
            if seen.digest() != sent:
                raise ValueError(f"chunk {chunk} came with a wrong digest")
            yield chunk
        if response.will_close:
            self.close()

    def _ask(self, first: int, last: int) -> http.client.HTTPResponse:
        source = self._source
        path = source.path(first, last)
        headers = self._connected(path)
        known = source.announcement
        # The first answer may have to wait until the member has finished its own part of the quorum.
        self._socket.settimeout(source.left() if known is None else source.left(_SILENCE_SECONDS))
        response = self._request(path, headers | ({} if known is None else {"If-Match": known.tag}))
        if response.status != 200:
            raise _Refused(f"shared state of step {source.step}: the member answered {_status(response)}")
        self._check_member(response)
        source.learn(Announcement.from_headers(response.headers))
        if last >= source.announcement.num_chunks or response.length != source.announcement.answer_bytes(first, last):
            raise ValueError(f"an answer of {response.length} bytes for the chunks {first} to {last}")
        self._socket.settimeout(source.left(_SILENCE_SECONDS))
        return response

    def _connected(self, path: str) -> dict[str, str]:
        """Connect if need be; returns the headers that introduce this site on a new connection."""
        if self._connection is not None:
            return {}
        self._connection = self._source.connect()
        self._socket = self._connection.sock
        if self._source.secret is None:
            return {}
        self._client, self._key = Client(self._source.secret), None
        response = self._request(path, self._client.greeting())
        if response.status != 401:
            raise _Refused(f"shared state: {_NOT_PROVEN} (it answered {_status(response)})")
        response.read()
        return self._client.answer(response.headers)

    def _request(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        self._connection.request("GET", path, headers=headers)
        response = self._connection.getresponse()
        if response.status >= 500:
            raise ConnectionError(f"the member answered {response.status}")
        return response

    def _check_member(self, response: http.client.HTTPResponse) -> None:
        if self._client is None or self._key is not None:
            return
        self._key = self._client.key(response.headers)
        if self._key is None:
            raise _Refused(f"shared state: {_NOT_PROVEN}")

    def close(self) -> None:
        if self._connection is not None:
            self._source.forget(self._socket)
            self._connection.close()
            self._socket.close()
            self._connection = None


def _read(response: http.client.HTTPResponse, space: memoryview) -> None:
    while space:
        count = response.readinto(space)
        if not count:
            raise ConnectionError("the connection ended early")
        space = space[count:]


def _status(response: http.client.HTTPResponse) -> str:
    if response.status in (401, 403):
        return f"{response.status}: the member and this site do not hold the same secret (replica.secret_file)"
    return str(response.status)


def _is_final(problem: Exception) -> bool:
    if isinstance(problem, (_Refused, ssl.SSLCertVerificationError)):
        return True
    return isinstance(problem, ssl.SSLError) and bool(_REFUSED_CERTIFICATE.search(problem.reason or ""))

