"""Real connections of gated processes through the relay."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256

import pytest

from tests.lab.real_time import gated
from titan_ext.errors import RunError
from titan_ext.lab.real_time import gate
from titan_ext.lab.real_time.namespaced import NamespacedSites
from titan_ext.lab.real_time.relayed import RelayedSites
from titan_ext.links.link import Link, Links
from titan_ext.links.namespaces import missing


@contextmanager
def echoing(host: str) -> Iterator[int]:
    """The port of a server that returns what it gets, and an end for an end."""
    server = socket.create_server((host, 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            while part := connection.recv(65536):
                connection.sendall(part)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def inside(sites: RelayedSites | NamespacedSites, place: int, what: str, host: str, port: int) -> list[str]:
    command = sites.inside(place, [sys.executable, gated.__file__, what, host, str(port)])
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


def links(rtt: float) -> Links:
    return Links.alike(["east", "west"], Link(100e6, rtt))


def test_bytes_come_as_they_were_and_not_before_their_time() -> None:
    with closing(RelayedSites(links(0.1), seed=1)) as sites, echoing(sites.addresses[1]) as port:
        seconds, digest = inside(sites, 0, "echo", sites.addresses[1], port)
        assert float(seconds) > 0.099
        assert digest == sha256(gated.message(300_000)).hexdigest()
        assert sites.bytes_sent() == [300_002, 300_002]
        # Within a site nothing is in the way.
        inside(sites, 1, "echo", sites.addresses[1], port)
        assert sites.bytes_sent() == [300_002, 300_002]


def test_connections_of_any_kind_pass_and_those_to_nobody_are_refused() -> None:
    with closing(RelayedSites(links(0.0), seed=1)) as sites:
        with echoing(sites.addresses[1]) as port:
            assert inside(sites, 0, "mapped", sites.addresses[1], port) == ["hi"]
            assert sites.bytes_sent() == [2, 2]
        assert inside(sites, 0, "refused", sites.addresses[1], port) == ["ECONNREFUSED"]


CUTS = {
    "two sites": (lambda sites: sites.partition((0, 1), 3.0), lambda sites: sites.addresses[1]),
    "a site": (lambda sites: sites.cut_off(0, 3.0), lambda sites: sites.addresses[1]),
    "a site from the lighthouse": (lambda sites: sites.cut_off(0, 3.0), lambda sites: sites.lighthouse),
}
"""How something is cut off, and from what."""


@pytest.mark.parametrize("cut", CUTS)
def test_what_is_cut_off_comes_when_the_partition_is_over(cut: str) -> None:
    strike, target = CUTS[cut]
    with closing(RelayedSites(links(0.0), seed=1)) as sites, echoing(target(sites)) as port:
        strike(sites)
        command = sites.inside(0, [sys.executable, gated.__file__, "mapped", target(sites), str(port)])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        assert process.communicate(timeout=30)[0] == "hi\n"


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")
def test_sites_in_namespaces_are_as_far_apart_and_are_cut_off_from_each_other() -> None:
    with closing(NamespacedSites(links(0.1))) as sites:
        address, port = sites.addresses[1], 29_812
        server = [sys.executable, gated.__file__, "serve", address, str(port)]
        with subprocess.Popen(sites.inside(1, server), stdout=subprocess.PIPE, text=True) as serving:
            try:
                assert serving.stdout.readline() == "listening\n"
                seconds, digest = inside(sites, 0, "echo", address, port)
                assert float(seconds) > 0.099
                assert digest == sha256(gated.message(300_000)).hexdigest()
                assert all(300_000 < sent < 400_000 for sent in sites.bytes_sent())
                sites.cut_off(0, seconds=3.0)
                client = [sys.executable, gated.__file__, "mapped", address, str(port)]
                with subprocess.Popen(sites.inside(0, client), stdout=subprocess.PIPE, text=True) as process:
                    with pytest.raises(subprocess.TimeoutExpired):
                        process.wait(1.0)
                    assert process.communicate(timeout=60)[0] == "hi\n"
            finally:
                serving.kill()


def test_the_lighthouse_is_reached_through_the_relay_too() -> None:
    with closing(RelayedSites(links(0.0), seed=1)) as sites, echoing(sites.lighthouse) as port:
        assert inside(sites, 1, "mapped", sites.lighthouse, port) == ["hi"]
        assert sites.bytes_sent() == [0, 2]


def test_a_machine_of_another_kind_is_told_of_virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.platform, "machine", lambda: "s390x")
    with pytest.raises(RunError, match="x86_64 or aarch64; add --virtual-time"):
        gate._install_filter()


def test_a_kernel_that_refuses_the_filter_is_told_of_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = "import sys; sys.exit('titan-ext: error: the kernel refuses')"
    monkeypatch.setattr(RelayedSites, "inside", lambda *_: [sys.executable, "-c", refuses])
    with pytest.raises(RunError, match="^the kernel refuses$"):
        RelayedSites(links(0.0), seed=1)
