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

from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.chunks import DIGEST_BYTES, MessageInfo, chunk_digest, request_path
from titan_ext.replica.state_transfer.handshake import ClientHandshake
from titan_ext.replica.state_transfer.sockets import OpenSockets
from titan_ext.replica.state_transfer.state_format import IncomingMessage, header_end
from titan_ext.replica.streams.distance import round_trip_seconds, streams_for

logger = logging.getLogger(__name__)

# Chunks of one request: many, since each request costs a round trip on the connection.
_CHUNKS_PER_REQUEST = 16
_MAX_FAILURES = 8  # in a row without one good chunk; the pauses between them come to some ten seconds
_MAX_WRONG_ANSWERS = 3  # in a row: a digest that does not fit, or headers that make no sense
_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.05, 5.0
_CONNECT_SECONDS = 20.0
_READ_SECONDS = 30.0  # without a byte, after which a connection that was answering counts as broken
_REFUSED_CERTIFICATE = re.compile("ALERT.*(CERTIFICATE|UNKNOWN_CA)")
_NOT_PROVEN = "the member does not prove to hold this site's secret (replica.secret_file)"

# Where the message's bytes from start to stop are to be written.
_Buffers = Callable[[int, int], Iterable[memoryview]]


def fetch_state(
    url: str,
    step: int,
    *,
    timeout: float,
    streams: int = 0,
    context: ssl.SSLContext | None = None,
    secret: Secret | None = None,
) -> Any:
    """Fetch the shared state that a member serves.

    What fails is tried again from the last good chunk, until it fails several times in a row.

    Args:
        url: the member's ``StateTransport.metadata()``.
        step: the step whose state is wanted.
        timeout: seconds until the whole state must be here.
        streams: connections that share the transfer; 0: as many as the distance asks for.
        context: for https; without it, only http is accepted.
        secret: what the member has to prove to hold, as this site does.

    Raises:
        ValueError: what the member sent is malformed, or a chunk's digest is wrong again and again.
        OSError: the member cannot be reached, refuses or stopped answering; TimeoutError at the deadline.
    """
    transfer = _Transfer(url, step, timeout, context, secret)
    late = TimeoutError(f"shared state: not fetched from {url} within {timeout:g} s")
    # Ends all connections at the deadline: their own timeouts bound a single read.
    timer = threading.Timer(timeout, transfer.stop, [late])
    timer.daemon = True
    timer.start()
    first = _Connection(transfer)
    try:
        message, last = _fetch_header(first, transfer)
        rest = range(last + 1, transfer.info.num_chunks)
        streams = streams or first.streams_for_its_distance()
        _fetch_in_parallel(transfer, first, _requests(rest, streams), message.buffers, streams)
        return message.state()
    finally:
        timer.cancel()
        transfer.stop(ConnectionAbortedError("the transfer is over"))
        first.close()


def _fetch_header(connection: "_Connection", transfer: "_Transfer") -> tuple[IncomingMessage, int]:
    """The message with its tensors allocated, and the last of the chunks that had to be fetched for its header."""
    chunks: dict[int, bytearray] = {}

    def buffers(start: int, stop: int) -> Iterable[memoryview]:
        chunks[start] = bytearray(stop - start)
        return [memoryview(chunks[start])]

    connection.fetch(0, 0, buffers)
    info = transfer.info
    end = header_end(chunks[0], info.num_bytes)
    last = (end - 1) // info.chunk_bytes
    if last > 0:
        connection.fetch(1, last, buffers)
    data = memoryview(b"".join(chunks[start] for start in sorted(chunks)))
    message = IncomingMessage(bytes(data[:end]), info.num_bytes)
    copied = end  # the last of these chunks also has the first bytes of the tensors
    for buffer in message.buffers(end, len(data)):
        buffer[:] = data[copied : copied + len(buffer)]
        copied += len(buffer)
    return message, last


def _requests(chunks: range, streams: int) -> list[range]:
    """Shorter and shorter ones: connections differ in speed, and none should be left with much when the others are done."""
    requests: list[range] = []
    while chunks:
        length = min(_CHUNKS_PER_REQUEST, math.ceil(len(chunks) / (2 * streams)))
        requests.append(chunks[:length])
        chunks = chunks[length:]
    return requests


def _fetch_in_parallel(
    transfer: "_Transfer", first: "_Connection", requests: list[range], buffers: _Buffers, streams: int
) -> None:
    waiting = deque(requests)

    def work(connection: _Connection) -> None:
        try:
            while True:
                try:
                    chunks = waiting.popleft()
                except IndexError:
                    return
                connection.fetch(chunks[0], chunks[-1], buffers)
        except BaseException as error:  # noqa: BLE001 — kept for the thread that waits
            transfer.stop(error)  # ends the other connections too; raised below, by the thread that waits for all
        finally:
            connection.close()

    workers = [first, *(_Connection(transfer) for _ in range(min(streams, len(requests)) - 1))]
    with ThreadPoolExecutor(len(workers), thread_name_prefix="titan_ext-fetch") as pool:
        for connection in workers:
            pool.submit(work, connection)
    if transfer.failure is not None:
        raise transfer.failure


class _Refused(OSError):
    """The member will not answer otherwise if it is asked again."""


class _Transfer:
    """What the connections of one transfer share: from where, until when, and whether it has failed."""

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
        self.info: MessageInfo | None = None
        self._host, self._port, self._root = parts.hostname, parts.port, parts.path
        self._context = context
        self._deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._sockets = OpenSockets()

    def seconds_left(self, at_most: float = math.inf) -> float:
        """Seconds until the deadline; above 0, since 0 would make a socket non-blocking."""
        return max(0.001, min(at_most, self._deadline - time.monotonic()))

    def path(self, first: int, last: int) -> str:
        return self._root + request_path(self.step, first, last)

    def connect(self) -> http.client.HTTPConnection:
        timeout = self.seconds_left(_CONNECT_SECONDS)
        if self._context is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._context)
        connection.connect()
        self._sockets.add(connection.sock)
        if self.failure is not None:  # set before the sockets were cut, perhaps without this one
            self._sockets.cut_all()
        return connection

    def discard(self, connection: Any) -> None:
        self._sockets.discard(connection)

    def set_info(self, info: MessageInfo) -> None:
        """Keep what an answer says of the message; all answers must say the same."""
        with self._lock:
            if self.info not in (None, info):
                raise ValueError("the member offers another message than before")
            self.info = info

    def stop(self, failure: BaseException) -> None:
        """End the transfer; the first failure is the one that counts."""
        with self._lock:
            self.failure = self.failure or failure
        self._stopped.set()
        self._sockets.cut_all()

    def pause(self, seconds: float) -> None:
        self._stopped.wait(min(seconds, self.seconds_left()))


class _Connection:
    """One connection to the member, made again when it breaks."""

    def __init__(self, transfer: _Transfer) -> None:
        self._transfer = transfer
        self._connection: http.client.HTTPConnection | None = None
        self._socket: Any = None
        self._handshake: ClientHandshake | None = None
        self._key: bytes | None = None

    def fetch(self, first: int, last: int, buffers: _Buffers) -> None:
        """Write the chunks ``first`` to ``last`` into their buffers; a wrong chunk is overwritten or raises."""
        failures = wrong_answers = 0
        while first <= last:
            try:
                for chunk in self._receive(first, last, buffers):
                    first, failures, wrong_answers = chunk + 1, 0, 0
                continue
            except OSError as error:
                problem: Exception = error
                failures += 1
            except (ValueError, http.client.HTTPException) as error:
                problem = error
                wrong_answers += 1
            self.close()
            if self._transfer.failure is not None:
                raise self._transfer.failure
            if wrong_answers == _MAX_WRONG_ANSWERS:
                raise ValueError(
                    f"shared state: chunk {first}, asked for {wrong_answers} times: {problem!r}"
                ) from problem
            if failures == _MAX_FAILURES or _is_final(problem):
                raise problem
            logger.warning("shared state: fetching chunk %d again (%r)", first, problem)
            self._transfer.pause(min(_MIN_PAUSE_SECONDS * 2.0 ** (failures + wrong_answers), _MAX_PAUSE_SECONDS))

    def _receive(self, first: int, last: int, buffers: _Buffers) -> Iterator[int]:
        """Send one request, and yield each chunk once it is complete and its digest right."""
        response = self._request_chunks(first, last)
        for chunk in range(first, last + 1):
            digest = chunk_digest(self._key, self._transfer.step, self._transfer.info, chunk)
            for buffer in buffers(*self._transfer.info.span(chunk)):
                _read_into(buffer, response)
                digest.update(buffer)
            received = bytearray(DIGEST_BYTES)
            _read_into(memoryview(received), response)
            if digest.digest() != received:
                raise ValueError(f"chunk {chunk} came with a wrong digest")
            yield chunk
        if response.will_close:
            self.close()

    def _request_chunks(self, first: int, last: int) -> http.client.HTTPResponse:
        transfer = self._transfer
        path = transfer.path(first, last)
        headers = self._connect(path)
        known = transfer.info
        # The first answer may have to wait until the member has finished its own part of the quorum.
        self._socket.settimeout(transfer.seconds_left() if known is None else transfer.seconds_left(_READ_SECONDS))
        response = self._get(path, headers | ({} if known is None else {"If-Match": known.tag}))
        if response.status != 200:
            raise _Refused(f"shared state of step {transfer.step}: the member answered {_status(response)}")
        self._authenticate_member(response)
        transfer.set_info(MessageInfo.from_headers(response.headers))
        if last >= transfer.info.num_chunks or response.length != transfer.info.answer_bytes(first, last):
            raise ValueError(f"an answer of {response.length} bytes for the chunks {first} to {last}")
        self._socket.settimeout(transfer.seconds_left(_READ_SECONDS))
        return response

    def _connect(self, path: str) -> dict[str, str]:
        """Connect if need be; returns the headers that authenticate this site on a new connection."""
        if self._connection is not None:
            return {}
        self._connection = self._transfer.connect()
        self._socket = self._connection.sock
        if self._transfer.secret is None:
            return {}
        self._handshake, self._key = ClientHandshake(self._transfer.secret), None
        response = self._get(path, self._handshake.first_request())
        if response.status != 401:
            raise _Refused(f"shared state: {_NOT_PROVEN} (it answered {_status(response)})")
        response.read()
        return self._handshake.second_request(response.headers)

    def _get(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        self._connection.request("GET", path, headers=headers)
        response = self._connection.getresponse()
        if response.status >= 500:
            raise ConnectionError(f"the member answered {response.status}")
        return response

    def _authenticate_member(self, response: http.client.HTTPResponse) -> None:
        if self._handshake is None or self._key is not None:
            return
        self._key = self._handshake.key(response.headers)
        if self._key is None:
            raise _Refused(f"shared state: {_NOT_PROVEN}")

    def streams_for_its_distance(self) -> int:
        """Connections like this one that would keep a long link busy."""
        return streams_for(round_trip_seconds(self._socket))

    def close(self) -> None:
        if self._connection is not None:
            self._transfer.discard(self._socket)
            self._connection.close()
            self._socket.close()
            self._connection = None


def _read_into(buffer: memoryview, response: http.client.HTTPResponse) -> None:
    while buffer:
        count = response.readinto(buffer)
        if not count:
            raise ConnectionError("the connection ended early")
        buffer = buffer[count:]


def _status(response: http.client.HTTPResponse) -> str:
    if response.status in (401, 403):
        return f"{response.status}: the member and this site do not hold the same secret (replica.secret_file)"
    return str(response.status)


def _is_final(problem: Exception) -> bool:
    if isinstance(problem, (_Refused, ssl.SSLCertVerificationError)):
        return True
    return isinstance(problem, ssl.SSLError) and bool(_REFUSED_CERTIFICATE.search(problem.reason or ""))
