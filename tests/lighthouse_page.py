"""Waiting for what a lighthouse's page says of its sites."""

import re
import time
import urllib.request
from collections.abc import Callable

# Far above what anything here takes: it ends a test that hangs, and decides nothing.
PATIENCE_SECONDS = 120


def wait_for_requests(url: str, count: int) -> None:
    """Until at least ``count`` sites wait in the quorum.

    Members of the last quorum who are all there go on without anybody else, also without a site that has
    sent heartbeats: a newcomer is in their next quorum for certain only once it has asked.
    """
    wait_until(lambda: _counted(r"\[(\d+)/\d+ participants healthy\]", url) >= count, f"{count} site(s) in the quorum")


def wait_for_heartbeats(url: str, count: int) -> None:
    """Until the lighthouse hears from ``count`` sites: enough for its first quorum, which waits for all of them."""
    wait_until(lambda: _counted(r"\[(\d+) heartbeating\]", url) >= count, f"{count} site(s) that are heard of")


def _counted(pattern: str, url: str) -> int:
    found = re.search(pattern, page(url))
    return int(found[1]) if found else 0


def members(url: str) -> list[str]:
    """Names of the sites of the last quorum."""
    return re.findall(r"<b>(\w+):[0-9a-f-]{36}</b>", page(url))


def page(url: str) -> str:
    """The page; empty while nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
