"""Measuring a link over the loopback."""

import socket

import pytest

from titan_ext.errors import RunError, UserError
from titan_ext.links.probe import answering, measure


def test_both_sides_meet_and_count() -> None:
    with answering(0, "127.0.0.1") as port:
        link = measure(f"127.0.0.1:{port}", seconds=0.2)
        with socket.create_connection(("127.0.0.1", port)):
            pass  # one that leaves at once harms nobody
        again = measure(f"127.0.0.1:{port}", seconds=0.2)
    assert 0 < link.rtt < 10 and link.rate > 1e6 and link.loss == 0
    assert again.rate > 1e6
    with pytest.raises(RunError, match=f"titan-ext plan --answer {port}"):
        measure(f"127.0.0.1:{port}", seconds=0.2)


@pytest.mark.parametrize("address", ["", "host", "host:", ":29600", "host:port", "host:0", "host:65536"])
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="A-B=HOST:PORT"):
        measure(address)


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_that_are_refused(port: int) -> None:
    with pytest.raises(UserError, match=f"--answer {port}"), answering(port):
        pass


def test_a_port_that_is_taken() -> None:
    with answering(0, "127.0.0.1") as port:
        with pytest.raises(UserError, match=f"--answer {port}"), answering(port, "127.0.0.1"):
            pass
