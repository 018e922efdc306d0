"""Shared state fetched before a site is heard of, so that nobody waits while it travels.

In a quorum the members wait for a newcomer until it has their state; over a thin link that is long. A
newcomer therefore first asks a member for a copy, which that one makes between two inner steps and serves
while it trains on. If the members have not committed a round since, the newcomer needs nothing more in its
first quorum; otherwise, or if no member can give a copy, it fetches the state there.
"""

import logging
import re
import time
import urllib.request
from collections.abc import Callable
from datetime import timedelta

from torchft._torchft import ManagerClient

logger = logging.getLogger(__name__)

_SECONDS = 5.0  # for the lighthouse's page and a member's answer
_ALIVE_SECONDS = 5.0  # since a member's last heartbeat

# The lighthouse's page is the one place that names a quorum's members without taking part in it.
_MEMBER = re.compile(r"<b>([^<]+):([0-9a-f-]{36})</b>.*?Manager: (\S+) <br/>", re.DOTALL)
_HEARTBEAT = re.compile(r":([0-9a-f-]{36}): seen ([0-9.e-]+)s ago")


def fetch_ahead(lighthouse: str, *, site: str, rank: int, fetch: Callable[[str], None]) -> bool:
    """Fetch a copy of the shared state from a member of the last quorum that still lives.

    Args:
        lighthouse: its URL.
        site: name of this site; an earlier process of its own is no member.
        rank: this rank within the site.
        fetch: called with the address at which the same rank of a member serves state.

    Returns:
        whether there is a copy now. All failures are logged and count as no.
    """
    started = time.monotonic()
    for name, address in _members(lighthouse):
        if name == site:
            continue
        try:
            client = ManagerClient(address, connect_timeout=timedelta(seconds=_SECONDS))
            fetch(client._checkpoint_metadata(rank, timeout=timedelta(seconds=_SECONDS)))
        except (OSError, ValueError, RuntimeError) as error:
            logger.info("no copy of the shared state from site %s before the first quorum: %s", name, error)
            continue
        logger.info("fetched the shared state of site %s ahead, in %.1f s", name, time.monotonic() - started)
        return True
    return False


def _members(lighthouse: str) -> list[tuple[str, str]]:
    """Name and manager's address of each member of the last quorum that is heard of."""
    try:
        with urllib.request.urlopen(f"{lighthouse}/status", timeout=_SECONDS) as answer:
            page = answer.read().decode(errors="replace")
    except OSError as error:
        logger.info("the lighthouse does not tell who trains: %s", error)
        return []
    alive = {identity for identity, seconds in _HEARTBEAT.findall(page) if float(seconds) < _ALIVE_SECONDS}
    return [(name, address) for name, identity, address in _MEMBER.findall(page) if identity in alive]
