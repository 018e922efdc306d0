"""Addresses: where the lighthouse is and under which address the other sites reach this one."""

import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path
from urllib.parse import urlsplit

from titan_ext.errors import UserError


def lighthouse_url(setting: str | None) -> str:
    """The lighthouse's URL from the setting or the environment.

    Raises:
        UserError: neither is given, or it is not an address.
    """
    address = setting or os.environ.get("TORCHFT_LIGHTHOUSE", "")
    if not address:
        raise UserError(
            "replica.lighthouse is not set and neither is the TORCHFT_LIGHTHOUSE variable: "
            "give the lighthouse's address, such as --replica.lighthouse=host:29510"
        )
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme == "http" and parts.hostname and parts.port
    except ValueError:
        valid = False
    if not valid:
        key = "replica.lighthouse" if setting else "the variable TORCHFT_LIGHTHOUSE"
        raise UserError(f'{key} = "{address}": must be host:port or http://host:port')
    return url


def reachable_address(lighthouse: str) -> str:
    """The numeric address of the interface through which this machine reaches the lighthouse.

    A host name would have to be known at every other site; the address of the interface that
    leads to the lighthouse needs no name service.

    Raises:
        UserError: the lighthouse's name cannot be resolved or there is no route to it.
    """
    parts = urlsplit(lighthouse)
    try:
        return address_towards(parts.hostname, parts.port)
    except OSError as error:
        raise UserError(f"replica.lighthouse = {lighthouse}: no way to {parts.hostname} ({error})") from error


def address_towards(host: str | None, port: int | None) -> str:
    """The numeric address of the interface through which this machine reaches a host.

    Raises:
        OSError: the host's name cannot be resolved or there is no route to it.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket sends nothing here; it only picks the route
        return probe.getsockname()[0]


def own_address(hostname: str) -> str:
    """Check that ``hostname`` is a name or address of this machine, and return it.

    Raises:
        UserError: it does not resolve, or this machine cannot listen there.
    """
    setting = f'replica.hostname = "{hostname}"'
    try:
        found = socket.getaddrinfo(hostname, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{setting}: cannot be resolved ({error})") from error
    if not any(_is_own(*info) for info in found):
        addresses = ", ".join(sorted({str(address[0]) for *_, address in found}))
        raise UserError(
            f"{setting}: {addresses} is no address of this machine: give one that the other sites reach, "
            "or the interface that has it (replica.interface)"
        )
    return hostname


def _is_own(family: int, kind: int, protocol: int, _: str, address: tuple) -> bool:
    if ipaddress.ip_address(address[0].split("%")[0]).is_unspecified:
        return False  # can be bound everywhere, and reached from nowhere
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


_SIOCGIFADDR = 0x8915


def interface_address(name: str) -> str:
    """The numeric address of a network interface: IPv4, or IPv6 where it has no other.

    Raises:
        UserError: there is no such interface, or it has no address that other machines could use.
    """
    setting = f'replica.interface = "{name}"'
    names = [found for _, found in socket.if_nameindex()]
    if name not in names:
        raise UserError(f"{setting}: no such interface; this machine has {', '.join(names)}")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            return socket.inet_ntoa(answer[20:24])
    except OSError:
        pass  # no IPv4
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        address, _, _, scope, _, device = line.split()
        if device == name and scope in ("00", "10"):  # global and unique local, not link-local
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))
    raise UserError(f"{setting}: it has no address that other machines could reach")


def interface_with(address: str) -> str | None:
    """Name of the network interface that has an address; None where it is not an interface's first one."""
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == address:
                return name
        except UserError:
            continue  # an interface without any
    return None


def check_port(setting: str, port: int) -> None:
    """Refuse a port that cannot be listened on; 0 stands for a free one.

    Raises:
        UserError: naming ``setting``.
    """
    if not port:
        return
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do it
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("::", port))
            probe.listen()
    except (OSError, OverflowError) as error:
        raise UserError(f"{setting}: cannot listen on port {port} ({error})") from error


def url_host(host: str) -> str:
    """``host`` as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_listening(lighthouse: str, timeout: float = 3.0) -> bool:
    """Whether something accepts connections at the lighthouse's address."""
    parts = urlsplit(lighthouse)
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=timeout):
            return True
    except OSError:
        return False
