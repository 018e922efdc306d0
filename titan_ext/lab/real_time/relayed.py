"""Sites on this machine's loopback interface, behind gates, with a relay between them; needs no root."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from titan_ext.errors import RunError, UserError
from titan_ext.lab.real_time.gate import pass_through
from titan_ext.lab.real_time.relay import Relay
from titan_ext.lab.real_time.shaping import Shaper
from titan_ext.launcher.log import ERROR_PREFIX
from titan_ext.links.link import Links
from titan_ext.replica.streams.distance import streams_for

_MOST_SITES = 250
_SUBNET = "127.77.0"


class RelayedSites:
    """As ``Surroundings``. The kernel's own round-trip time of a connection is that to the relay: sites that leave the
    number of their connections to the distance are told what it would be.

    Args:
        links: between the sites.
        seed: of what is lost.

    Raises:
        UserError: there are too many sites.
        RunError: the kernel refuses what a gate needs.
    """

    lighthouse = f"{_SUBNET}.254"

    def __init__(self, links: Links, seed: int) -> None:
        count = len(links.sites)
        if count > _MOST_SITES:
            raise UserError(f"--sites {count}: at most {_MOST_SITES} in real time; add --virtual-time")
        self.addresses = [f"{_SUBNET}.{place + 1}" for place in range(count)]
        self.streams = max((streams_for(link.rtt, count - 1) for link in links.all()), default=None)
        self._folder = tempfile.TemporaryDirectory(prefix="titan_ext-lab-")
        self._path = Path(self._folder.name, "gate")
        self._relay = Relay(Shaper(links, seed=seed), [*self.addresses, self.lighthouse], self._path)
        self._try_gate()

    def inside(self, place: int, command: Sequence[str]) -> list[str]:
        """As ``Surroundings.inside``."""
        return [sys.executable, "-m", "titan_ext.lab.real_time.gate", str(self._path), str(place), *command]

    def gate(self, place: int) -> Callable[[], None]:
        """What puts the calling process where a site is, before it has threads."""
        return partial(pass_through, str(self._path), place)

    def lighthouse_command(self, command: Sequence[str]) -> list[str]:
        """As ``Surroundings.lighthouse_command``."""
        return list(command)

    def partition(self, pair: Sequence[int], seconds: float) -> None:
        """As ``Surroundings.partition``."""
        self._relay.partition(pair, seconds)

    def cut_off(self, place: int, seconds: float) -> None:
        """As ``Surroundings.cut_off``."""
        for other in {self._relay.shaper.lighthouse, *range(len(self.addresses))} - {place}:
            self._relay.partition((place, other), seconds)

    def bytes_sent(self) -> list[int]:
        """As ``Surroundings.bytes_sent``: payload of TCP."""
        return self._relay.shaper.sent[:-1]

    def close(self) -> None:
        """As ``Surroundings.close``."""
        self._relay.close()
        self._folder.cleanup()

    def _try_gate(self) -> None:
        """Before each site fails by itself."""
        found = subprocess.run(self.inside(0, ["true"]), capture_output=True, text=True)
        if found.returncode:
            self.close()
            raise RunError(found.stderr.strip().removeprefix(f"{ERROR_PREFIX} "))
