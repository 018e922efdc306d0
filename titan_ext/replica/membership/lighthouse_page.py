"""What the lighthouse tells on its page: the one place that names sites without taking part in a quorum."""

import re
import urllib.request
from dataclasses import dataclass

_ANSWER_SECONDS = 5.0
_MEMBER = re.compile(
    r"<b>([^<]+):([0-9a-f-]{36})</b>.*?Step: (\d+).*?Manager: (\S+) <br/>\s*TCPStore: (\S+) <br/>", re.DOTALL
)
_HEARTBEAT = re.compile(r"^\s*(\S+): seen ([0-9.e-]+)s ago", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Member:
    """A site of the last quorum."""

    name: str
    identity: str
    """Of the process: another one after each start."""
    step: int
    """Rounds, as torchft counts them."""
    manager: str
    """URL of its manager server."""
    store: str
    """``host:port/prefix`` of its store."""


@dataclass(frozen=True, slots=True)
class LighthousePage:
    """The page at one moment."""

    members: list[Member]
    heartbeats: dict[str, float]
    """Seconds since the last heartbeat, by replica id: ``name:identity`` for a site."""

    def alive(self, seconds: float) -> list[Member]:
        """Members who were heard of in the last so many seconds."""
        return [each for each in self.members if self.heartbeats.get(f"{each.name}:{each.identity}", seconds) < seconds]


def read_lighthouse_page(lighthouse: str) -> LighthousePage:
    """Read the page.

    Args:
        lighthouse: its URL.

    Raises:
        OSError: it does not answer.
    """
    with urllib.request.urlopen(f"{lighthouse}/status", timeout=_ANSWER_SECONDS) as answer:
        text = answer.read().decode(errors="replace")
    members = [Member(name, identity, int(step), *rest) for name, identity, step, *rest in _MEMBER.findall(text)]
    return LighthousePage(members, {name: float(age) for name, age in _HEARTBEAT.findall(text)})
