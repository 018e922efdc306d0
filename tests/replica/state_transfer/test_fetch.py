"""Fetching shared state over lines that break and from members that lie."""

import pickle
import socket
import struct
import time
from datetime import timedelta

import pytest
import torch

from tests.replica.state_transfer.faults import Line, always, answer, listening
from tests.replica.state_transfer.states import assert_same
from tests.replica.state_transfer.test_state_format import Bomb, encoded, refuse_to_allocate
from tests.replica.state_transfer.test_transport import TIMEOUT, transport
from titan_ext.replica.state_transfer.fetch import fetch_state

CHUNK = 2**16
CHUNKS = 16
# Chunk 3 is full of this byte, so that a line can tell it from the others.
MARK = b"\xab"


def marked_state() -> dict:
    data = torch.arange(CHUNKS * CHUNK, dtype=torch.int64).bitwise_and(0x7F).to(torch.uint8)
    data[3 * CHUNK : 4 * CHUNK - 1000] = MARK[0]  # the header of some hundred bytes comes first
    return {"w": data}


def fetch_over(tamper, streams: int = 1):
    """The state, fetched over a line that ``tamper`` spoils, and the line."""
    with transport(chunk_bytes=CHUNK) as donor:
        donor.send_checkpoint([1], step=7, state_dict=marked_state(), timeout=TIMEOUT)
        line = Line(donor.metadata(), tamper)
        with listening(line.serve) as url:
            return fetch_state(url, 7, timeout=20, streams=streams), line


@pytest.mark.parametrize("streams", [1, 3])
def test_broken_connection_is_continued(streams):
    """No more travels again than the chunk in which it broke."""

    broken: dict[str, int] = {}

    def tamper(number, seen, data):
        if seen <= 5.5 * CHUNK / streams:
            return data
        # The first that comes so far: some may have little to do.
        return None if broken.setdefault("connection", number) == number else data

    state, line = fetch_over(tamper, streams)
    assert_same(state, marked_state())
    assert line.connections == streams + 1
    assert CHUNKS * CHUNK < line.bytes < (CHUNKS + 1.5) * CHUNK


def test_every_connection_breaks_now_and_then():
    state, line = fetch_over(lambda number, seen, data: None if seen > 2.5 * CHUNK else data, streams=2)
    assert_same(state, marked_state())
    assert line.connections >= CHUNKS / 3


def test_connection_that_never_holds_is_given_up():
    with pytest.raises(OSError):
        with transport() as donor:
            donor.send_checkpoint([1], step=7, state_dict=marked_state(), timeout=TIMEOUT)
            with listening(Line(donor.metadata(), lambda number, seen, data: None).serve) as url:
                fetch_state(url, 7, timeout=1)


def test_flipped_bit_is_fetched_again():
    flips = []

    def tamper(number, seen, data):
        if not flips and MARK * 2 in data:
            flips.append(number)
            return data.replace(MARK * 2, b"\xab\xaa", 1)
        return data

    state, line = fetch_over(tamper)
    assert flips and line.connections == 2
    assert_same(state, marked_state())


def test_bit_that_always_flips_is_an_error_naming_the_chunk():
    with pytest.raises(ValueError, match="shared state: chunk 3.*wrong digest"):
        fetch_over(lambda number, seen, data: data.replace(MARK * 2, b"\xaa" * 2))


def drip(opening: bytes):
    def serve(connection: socket.socket, number: int) -> None:
        connection.recv(65536)
        connection.sendall(opening)
        while True:
            connection.sendall(b"0")
            time.sleep(0.02)

    return serve


@pytest.mark.parametrize(
    "serve",
    [
        drip(b""),
        drip(b"HTTP/1.1 200 OK\r\nX-Slow: "),
        drip(answer(bytes(2**20))[:1000]),
        lambda connection, number: time.sleep(10),
    ],
    ids=["answer", "header", "body", "silence"],
)
def test_dripping_member_ends_at_the_deadline(serve):
    with listening(serve) as url:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            fetch_state(url, 7, timeout=0.5)
        assert time.monotonic() - started < 15


def wrong_sizes() -> bytes:
    return encoded({"w": torch.zeros(3, 4)}).replace(b"[3, 4]", b"[9, 4]")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + pickle.dumps(Bomb()),
        pickle.dumps(Bomb()) + b"\r\n",
        answer(pickle.dumps(Bomb())),
        answer(wrong_sizes()),
        answer(struct.pack("<Q", 2**60) + b"{}"),
        answer(struct.pack("<Q", 10) + b"{}"),
        answer(encoded({}), X_State_Bytes="9" * 40),
        answer(encoded({}), X_State_Bytes="-1"),
        answer(encoded({}), X_State_Bytes="0"),
        answer(encoded({}), X_Chunk_Bytes=str(2**40)),
        answer(encoded({}), ETag="x"),
        answer(encoded({}), Content_Length=str(2**40)),
        answer(encoded({}), Transfer_Encoding="chunked"),
        answer(encoded({}), X_Long="y" * 100_000),
        answer(encoded({}), **{f"X-{index}": "y" for index in range(200)}),
        answer(encoded({}))[:-1] + b"?",
    ],
    ids=[
        "pickle, no announcement",
        "pickle, no HTTP",
        "pickle as message",
        "wrong sizes",
        "huge header",
        "header beyond the end",
        "huge message",
        "negative message",
        "empty message",
        "huge chunks",
        "no tag",
        "wrong length",
        "no length",
        "long line",
        "many lines",
        "wrong digest",
    ],
)
def test_lying_member_is_refused(data, monkeypatch):
    monkeypatch.setattr(torch, "empty", refuse_to_allocate)
    with listening(always(data)) as url:
        with pytest.raises(ValueError):
            fetch_state(url, 7, timeout=15)


@pytest.mark.parametrize("url", ["https://127.0.0.1:1/state/", "file:///etc/passwd", "http://127.0.0.1/state/", ""])
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="shared state"):
        fetch_state(url, 7, timeout=5)


def test_member_that_stops_offering_ends_the_transfer():
    with transport(timedelta(seconds=2), chunk_bytes=CHUNK) as donor:
        donor.send_checkpoint([1], step=7, state_dict=marked_state(), timeout=TIMEOUT)

        def tamper(number, seen, data):
            if number == 0 and seen > 4 * CHUNK:
                donor.disallow_checkpoint()
                return None
            return data

        with listening(Line(donor.metadata(), tamper).serve) as url:
            with pytest.raises(OSError, match="412"):
                fetch_state(url, 7, timeout=20, streams=1)
