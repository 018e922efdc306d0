"""Addresses: where the lighthouse is and under which address the other sites reach this one."""

import os
import socket
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
        raise UserError(f'replica.lighthouse = "{address}": must be host:port or http://host:port')
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
        family, kind, protocol, _, target = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket sends nothing here; it only picks the route
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"replica.lighthouse = {lighthouse}: no way to {parts.hostname} ({error})") from error


def url_host(host: str) -> str:
    """``host`` as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_listening(lighthouse: str, timeout: float = 3.0) -> bool:
    """Whether something accepts connections at the lighthouse's address."""
    parts = urlsplit(lighthouse)
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=timeout):
            return True
    except OSError:
        return False
