"""Serving shared state: to whom, for how long, and what is refused."""

import http.client
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
import torch

from tests.replica.state_transfer.states import STATE, assert_same
from titan_ext.replica.state_transfer.chunks import MessageInfo
from titan_ext.replica.state_transfer.transport import StateTransport
from titan_ext.replica.streams.pace import Pace

TIMEOUT = timedelta(seconds=20)


@contextmanager
def transport(timeout: timedelta = TIMEOUT, **options):
    site = StateTransport("127.0.0.1", 0, timeout, **options)
    try:
        yield site
    finally:
        site.shutdown()


def address(site: StateTransport) -> tuple[str, int]:
    parts = urlsplit(site.metadata())
    return parts.hostname, parts.port


def ask(site: StateTransport, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*address(site), timeout=20)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


@pytest.mark.parametrize("streams", [1, 2, 5])
@pytest.mark.parametrize("chunk_bytes", [7, 1000, 2**20])
def test_between_two_ranks(streams, chunk_bytes):
    """Also with a header longer than a chunk, and with chunks that hold several tensors."""
    with transport(chunk_bytes=chunk_bytes) as donor, transport(streams=streams) as receiver:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        assert_same(receiver.recv_checkpoint(0, donor.metadata(), step=7, timeout=TIMEOUT), STATE)
        donor.disallow_checkpoint()


def test_one_who_asks_too_early_waits():
    with transport() as donor, transport() as receiver:
        later = threading.Timer(0.5, donor.send_checkpoint, [[1], 7, STATE, TIMEOUT])
        later.start()
        assert_same(receiver.recv_checkpoint(0, donor.metadata(), step=7, timeout=TIMEOUT), STATE)


def test_nothing_is_served_after_the_round():
    with transport(timedelta(seconds=0.2)) as donor, transport() as receiver:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        donor.disallow_checkpoint()
        with pytest.raises(urllib.request.HTTPError, match="404"):
            urllib.request.urlopen(donor.metadata() + "7/0-0", timeout=20)
        with pytest.raises(OSError, match="404"):
            receiver.recv_checkpoint(0, donor.metadata(), step=7, timeout=TIMEOUT)


@pytest.mark.parametrize(
    "path, status",
    [
        ("/", 404),
        ("/state/7", 404),
        ("/state/7/", 404),
        ("/state/7/0", 404),
        ("/state/7/0-0/", 404),
        ("/state/../state/7/0-0", 404),
        ("/state/-7/0-0", 404),
        ("/state/7/x-y", 404),
        ("/state/7/-1-0", 404),
        (f"/state/7/0-{'9' * 5000}", 404),
        ("/state/7/1-0", 416),
        ("/state/7/0-1", 416),
        (f"/state/7/0-{'9' * 18}", 416),
        ("/state/8/0-0", 404),
        ("/" + "x" * 70_000, 414),
    ],
    ids=lambda value: str(value)[:24],
)
def test_malformed_requests_are_refused(path, status):
    with transport(timedelta(seconds=0.3)) as donor:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        assert ask(donor, path).status == status
        assert ask(donor, "/state/7/0-0").status == 200


def test_huge_request_headers_are_refused():
    with transport() as donor:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        assert ask(donor, "/state/7/0-0", **{f"X-{index}": "y" for index in range(200)}).status == 431


def test_two_offers_of_one_step_do_not_mix():
    with transport(chunk_bytes=64) as donor:
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        first = MessageInfo.from_headers(ask(donor, "/state/7/0-0").headers)
        assert ask(donor, "/state/7/1-1", If_Match=first.tag).status == 200
        donor.disallow_checkpoint()
        assert ask(donor, "/state/7/1-1", If_Match=first.tag).status == 412
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        assert ask(donor, "/state/7/1-1", If_Match=first.tag).status == 412


def test_slow_reader_is_cut_before_tensors_change():
    tensor = torch.zeros(2**25, dtype=torch.uint8)
    with transport(timedelta(seconds=1), chunk_bytes=2**26) as donor:
        donor.send_checkpoint([1], step=7, state_dict={"w": tensor}, timeout=TIMEOUT)
        with socket.create_connection(address(donor), timeout=20) as reader:
            reader.sendall(b"GET /state/7/0-0 HTTP/1.1\r\n\r\n")
            received = reader.recv(4096)
            assert b"200 OK" in received
            donor.disallow_checkpoint()
            tensor.fill_(0xEE)
            try:
                while data := reader.recv(2**20):
                    received += data
            except ConnectionResetError:
                pass
        assert len(received) < tensor.numel()
        assert b"\xee" not in received


@pytest.mark.parametrize("opening", [b"", b"GET /state/7/0-0 HTTP/1.1\r\nX-Slow: "])
def test_dripping_request_is_cut(opening):
    with transport(timedelta(seconds=0.5)) as donor:
        with socket.create_connection(address(donor), timeout=20) as client:
            client.sendall(opening)
            deadline = time.monotonic() + 15
            with pytest.raises(ConnectionError):
                while time.monotonic() < deadline:
                    client.sendall(b"x")
                    time.sleep(0.02)


def test_slow_clients_do_not_keep_others_waiting():
    with transport() as donor, transport() as receiver:
        idle = [socket.create_connection(address(donor)) for _ in range(20)]
        donor.send_checkpoint([1], step=7, state_dict=STATE, timeout=TIMEOUT)
        assert_same(receiver.recv_checkpoint(0, donor.metadata(), step=7, timeout=TIMEOUT), STATE)
        donor.disallow_checkpoint()
        for connection in idle:
            connection.close()


def test_a_state_is_sent_no_faster_than_the_pace():
    """Over all connections together; a lower bound on time holds on any machine."""
    rate, state = 2_000_000.0, {"values": torch.arange(2_000_000, dtype=torch.uint8)}
    with transport(chunk_bytes=100_000, pace=Pace(rate)) as donor, transport(streams=4) as receiver:
        donor.send_checkpoint([1], step=7, state_dict=state, timeout=TIMEOUT)
        started = time.monotonic()
        assert_same(receiver.recv_checkpoint(0, donor.metadata(), step=7, timeout=TIMEOUT), state)
        assert time.monotonic() - started > 0.6, "a second's worth, less what may be sent at once"
