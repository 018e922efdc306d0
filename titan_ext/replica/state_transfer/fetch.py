"""The joining site's end of a transfer: chunks over several connections, checked, resumed, fetched again."""

import math
import ssl
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.state_format import Arrival, header_end
from titan_ext.replica.state_transfer.stream import Source, Spaces, Stream

# Chunks asked for at once: many, since each request costs a round trip on the connection.
_RUN_CHUNKS = 16


def fetch_state(
    url: str,
    step: int,
    *,
    timeout: float,
    streams: int = 2,
    context: ssl.SSLContext | None = None,
    secret: Secret | None = None,
) -> Any:
    """Fetch the shared state that a member serves.

    What fails is tried again from the last good chunk, until it fails several times in a row.

    Args:
        url: the member's ``StateTransport.metadata()``.
        step: the step whose state is wanted.
        timeout: seconds until the whole state must be here.
        streams: connections that share the transfer.
        context: for https; without it, only http is accepted.
        secret: what the member has to prove to hold, as this site does.

    Raises:
        ValueError: what the member sent is malformed, or a chunk's digest is wrong again and again.
        OSError: the member cannot be reached, refuses or stopped answering; TimeoutError at the deadline.
    """
    source = Source(url, step, timeout, context, secret)
    late = TimeoutError(f"shared state: not fetched from {url} within {timeout:g} s")
    # Looks at the clock for all connections: their own timeouts bound a single read.
    watch = threading.Timer(timeout, source.stop, [late])
    watch.daemon = True
    watch.start()
    first = Stream(source)
    try:
        arrival, last = _fetch_header(first, source)
        rest = range(last + 1, source.announcement.num_chunks)
        _fetch_runs(source, first, _runs(rest, streams), arrival.spaces, streams)
        return arrival.state()
    finally:
        watch.cancel()
        source.stop(ConnectionAbortedError("the transfer is over"))
        first.close()


def _fetch_header(stream: Stream, source: Source) -> tuple[Arrival, int]:
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


def _fetch_runs(source: Source, first: Stream, runs: list[range], spaces: Spaces, streams: int) -> None:
    waiting = deque(runs)

    def work(stream: Stream) -> None:
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

    workers = [first, *(Stream(source) for _ in range(min(streams, len(runs)) - 1))]
    with ThreadPoolExecutor(len(workers), thread_name_prefix="titan_ext-fetch") as pool:
        for stream in workers:
            pool.submit(work, stream)
    if source.failure is not None:
        raise source.failure
