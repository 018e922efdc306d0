"""Addresses and ports that cannot work are told at the start, in a line that names the key."""

import socket
import time

import pytest

from titan_ext.errors import UserError
from titan_ext.replica import Replica, ReplicaConfig
from titan_ext.replica.address import check_port, interface_address, own_address


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
def test_own_names_and_addresses(name):
    assert own_address(name) == name


@pytest.mark.parametrize(
    "name, said",
    [
        ("192.0.2.1", "192.0.2.1 is no address of this machine"),
        ("2001:db8::1", "2001:db8::1 is no address of this machine"),
        ("0.0.0.0", "0.0.0.0 is no address of this machine"),
        ("no-such-host.invalid", "cannot be resolved"),
        ("x" * 300, "cannot be resolved"),
        ("", "cannot be resolved"),
    ],
)
def test_others_are_refused(name, said):
    with pytest.raises(UserError, match=f'^replica.hostname = "{name}": .*{said}'):
        own_address(name)


def test_interfaces():
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(UserError, match='^replica.interface = "wg9": no such interface; this machine has .*lo'):
        interface_address("wg9")


def test_hostname_or_interface():
    with pytest.raises(ValueError, match="^interface = "):
        ReplicaConfig(hostname="127.0.0.1", interface="lo").validate()


def is_free(port: int) -> bool:
    try:
        check_port("", port)
    except UserError:
        time.sleep(0.1)
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_ports_in_use(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match="^replica.manager_port = 1: cannot listen on port .*in use"):
            check_port("replica.manager_port = 1", port)
    assert any(is_free(port) for _ in range(20))  # something else may have taken it for a moment
    check_port("", 0)
    with pytest.raises(UserError, match="cannot listen on port 65536"):
        check_port("", 65536)


@pytest.mark.parametrize("key", ["manager_port", "state_port"])
def test_a_rank_that_cannot_listen_says_so_before_it_looks_for_the_lighthouse(key, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = ReplicaConfig(lighthouse="127.0.0.1:1", hostname="127.0.0.1", **{key: port})
        with pytest.raises(UserError, match=f"^replica.{key} = {port}.*: cannot listen on port {port}"):
            Replica(config, site="east", rank=0, world_size=1)


def test_ports_of_the_ranks_and_of_the_manager_lie_apart():
    ports = {"state_port": 20_000, "manager_port": 20_001}  # below those that systems hand out by themselves
    config = ReplicaConfig(lighthouse="127.0.0.1:1", hostname="127.0.0.1", **ports)
    with pytest.raises(UserError, match="^replica.manager_port = 20001: lies among the 2 ports of the ranks"):
        Replica(config, site="east", rank=0, world_size=2)
