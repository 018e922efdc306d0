"""Shared state fetched before a site sends its first heartbeat, so that no member waits for the transfer.

In a quorum the members wait for a newcomer until it has their state; over a thin link that is long. A
newcomer therefore first asks a member for a snapshot, which the member makes between two inner steps and
serves while it trains on. If the members have not committed a round since, the newcomer needs nothing more in
its first quorum; otherwise, or if no member can give a snapshot, it fetches the state in the quorum. A site
that was away so long that the others had a quorum without it does the same.
"""

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from titan_ext.replica.membership.lighthouse_page import LighthousePage, read_lighthouse_page
from titan_ext.replica.torchft_internals import state_address

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 5.0  # for a member's answer
_RETRY_SECONDS = 1.0
_ALIVE_SECONDS = 5.0  # since a member's last heartbeat


def prefetch_state(
    lighthouse: str,
    *,
    site: str,
    rank: int,
    fetch: Callable[[str], None],
    nearest: Sequence[str] = (),
    replica_id: str | None = None,
    seconds: float = 0.0,
) -> bool:
    """Fetch a snapshot of the shared state from a member of the last quorum that still sends heartbeats.

    Args:
        lighthouse: its URL.
        site: name of this site; an earlier process of its own is no member.
        rank: this rank within the site.
        fetch: called with the address at which the same rank of a member serves state.
        nearest: names of the sites near to this one, the nearest first, which are asked before others.
        replica_id: of this process, if it has taken part before; nothing is fetched if the last quorum was with it.
        seconds: how long to wait for a lighthouse that does not answer.

    Returns:
        Whether there is a snapshot now. All failures are logged and count as no.
    """
    started = time.monotonic()
    page = _status_page(lighthouse, started + seconds)
    if replica_id in {f"{each.name}:{each.identity}" for each in page.members}:
        return False
    distance = {name: place for place, name in enumerate(nearest)}
    for member in sorted(page.alive(_ALIVE_SECONDS), key=lambda each: distance.get(each.name, len(distance))):
        if member.name == site:
            continue
        try:
            fetch(state_address(member.manager, rank, timedelta(seconds=_ANSWER_SECONDS)))
        except (OSError, ValueError, RuntimeError) as error:
            logger.info("no snapshot of the shared state from site %s before the first quorum: %s", member.name, error)
            continue
        logger.info("prefetched the shared state of site %s in %.1f s", member.name, time.monotonic() - started)
        return True
    return False


def _status_page(lighthouse: str, deadline: float) -> LighthousePage:
    while True:
        try:
            return read_lighthouse_page(lighthouse)
        except OSError as error:
            if time.monotonic() > deadline:
                logger.info("the lighthouse's page cannot be read: %s", error)
                return LighthousePage([], {})
        time.sleep(_RETRY_SECONDS)
