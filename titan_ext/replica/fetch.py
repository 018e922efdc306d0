"""The joining site's end of a transfer: chunks over several connections, checked, resumed, fetched again."""

import http.client
import logging
import math
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from titan_ext.replica.chunks import DIGEST_BYTES, Announcement, digest, request_path
from titan_ext.replica.sockets import OpenSockets
from titan_ext.replica.state_format import Arrival, header_end

logger = logging.getLogger(__name__)

_ATTEMPTS = 8  # in a row without one good chunk; the pauses between them come to some ten seconds
_WRONG_ANSWERS = 3  # in a row: a digest that does not fit, or headers that make no sense
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 5.0
_CONNECT_SECONDS = 20.0
_SILENCE_SECONDS = 30.0  # after which a connection that was answering counts as broken
# Chunks asked for at once: many, since each request costs a round trip on the connection.
_RUN_CHUNKS = 16
_REFUSED_CERTIFICATE = re.compile("ALERT.*(CERTIFICATE|UNKNOWN_CA)")

# Where the message's bytes from start to stop are to be written.
Spaces = Callable[[int, int], Iterable[memoryview]]


def fetch_state(url: str, step: int, *, timeout: float, streams: int = 2, context: ssl.SSLContext | None = None) -> Any:
    """Fetch the shared state that a member serves.

    What fails is tried again from the last good chunk, until it fails several times in a row.

    Args:
        url: the member's ``StateTransport.metadata()``.
        step: the step whose state is wanted.
        timeout: seconds until the whole state must be here.
        streams: connections that share the transfer.
        context: for https; without it, only http is accepted.

    Raises:
        ValueError: what the member sent is malformed, or a chunk's digest is wrong again and again.
        OSError: the member cannot be reached, refuses or stopped answering; TimeoutError at the deadline.
    """
    source = _Source(url, step, timeout, context)
    late = TimeoutError(f"shared state: not fetched from {url} within {timeout:g} s")
    # Looks at the clock for all connections: their own timeouts bound a single read.
    watch = threading.Timer(timeout, source.stop, [late])
    watch.daemon = True
    watch.start()
    first = _Stream(source)
    try:
        arrival, last = _fetch_header(first, source)
        rest = range(last + 1, source.announcement.num_chunks)
        _fetch_runs(source, first, _runs(rest, streams), arrival.spaces, streams)
        return arrival.state()
    finally:
        watch.cancel()
        source.stop(ConnectionAbortedError("the transfer is over"))
        first.close()


def _fetch_header(stream: "_Stream", source: "_Source") -> tuple[Arrival, int]:
    """The tensors to fill, and the last of the chunks that had to be fetched to know them."""
    chunks: dict[int, bytearray] = {}

    def spaces(start: int, stop: int) -> Iterable[memoryview]:
        chunks[start] = bytearray(stop - start)
        return [memoryview(chunks[start])]

    stream.take(0, 0, spaces)
    announcement = source.announcement
    end = header_end(chunks[0], announcement.num_bytes)
    last = (end - 1) // announcement.chunk_bytes
    if last > 0:
        stream.take(1, last, spaces)
    data = memoryview(b"".join(chunks[start] for start in sorted(chunks)))
    arrival = Arrival(bytes(data[:end]), announcement.num_bytes)
    done = end
    for space in arrival.spaces(end, len(data)):
        space[:] = data[done : done + len(space)]
        done += len(space)
    return arrival, last


def _runs(chunks: range, streams: int) -> list[range]:
    length = max(1, min(_RUN_CHUNKS, math.ceil(len(chunks) / streams)))
    return [chunks[at : at + length] for at in range(0, len(chunks), length)]


def _fetch_runs(source: "_Source", first: "_Stream", runs: list[range], spaces: Spaces, streams: int) -> None:
    waiting = deque(runs)

    def work(stream: _Stream) -> None:
        try:
            while True:
                try:
                    run = waiting.popleft()
                except IndexError:
                    return
                stream.take(run[0], run[-1], spaces)
        except BaseException as error:
            source.stop(error)
        finally:
            stream.close()

    workers = [first, *(_Stream(source) for _ in range(min(streams, len(runs)) - 1))]
    with ThreadPoolExecutor(len(workers), thread_name_prefix="titan_ext-fetch") as pool:
        for stream in workers:
            pool.submit(work, stream)
    if source.failure is not None:
        raise source.failure


class _Refused(OSError):
    pass


class _Source:
    """What the connections of one transfer share: where to, until when, and whether it has failed."""

    def __init__(self, url: str, step: int, timeout: float, context: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        wanted = "http" if context is None else "https"
        if parts.scheme != wanted or not parts.hostname or not parts.port:
            raise ValueError(
                f"shared state: a member serves it at {url}, where this site expects {wanted}: "
                "either all sites set replica.tls_certificate, tls_key and tls_authority, or none does"
            )
        self.step = step
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


class _Stream:
    """One connection to the member, made again when it breaks."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._connection: http.client.HTTPConnection | None = None
        self._socket: Any = None

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
            seen = digest()
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
        if self._connection is None:
            self._connection = source.connect()
            self._socket = self._connection.sock
        known = source.announcement
        # The first answer may have to wait until the member has finished its own part of the quorum.
        self._socket.settimeout(source.left() if known is None else source.left(_SILENCE_SECONDS))
        headers = {} if known is None else {"If-Match": known.tag}
        self._connection.request("GET", source.path(first, last), headers=headers)
        response = self._connection.getresponse()
        if response.status >= 500:
            raise ConnectionError(f"the member answered {response.status}")
        if response.status != 200:
            raise _Refused(f"shared state of step {source.step}: the member answered {response.status}")
        source.learn(Announcement.from_headers(response.headers))
        if last >= source.announcement.num_chunks or response.length != source.announcement.answer_bytes(first, last):
            raise ValueError(f"an answer of {response.length} bytes for the chunks {first} to {last}")
        self._socket.settimeout(source.left(_SILENCE_SECONDS))
        return response

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


def _is_final(problem: Exception) -> bool:
    if isinstance(problem, (_Refused, ssl.SSLCertVerificationError)):
        return True
    return isinstance(problem, ssl.SSLError) and bool(_REFUSED_CERTIFICATE.search(problem.reason or ""))

