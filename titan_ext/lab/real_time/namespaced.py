"""Sites in network namespaces of their own, with a router between them: the kernel's own TCP (Linux, root)."""

from collections.abc import Sequence

from titan_ext.errors import UserError
from titan_ext.links.link import Link, Links
from titan_ext.links.namespaces import HUB, HUB_PLACE, Wan, address_of, missing


class NamespacedSites:
    """As ``Surroundings``.

    Args:
        links: between the sites.

    Raises:
        UserError: there can be no namespaces here, with the reason.
        RunError: the system refuses a part of them.
    """

    lighthouse = HUB
    streams: int | None = None

    def __init__(self, links: Links) -> None:
        reason = missing()
        if reason is not None:
            raise UserError(f"--namespaces: {reason}; without it a rehearsal needs neither")
        places = range(len(links.sites))
        self.addresses = [address_of(place) for place in places]
        between = {(one, other): links.between(one, other) for one in places for other in range(one)}
        to_hub = {(place, HUB_PLACE): Link(links.port_rate(place), links.lighthouse_rtt(place)) for place in places}
        rates = {place: links.port_rate(place) / 1e6 for place in places}
        self._wan = Wan(len(places), max(rates.values()), rates_mbit=rates, links=between | to_hub)

    def inside(self, place: int, command: Sequence[str]) -> list[str]:
        """As ``Surroundings.inside``."""
        return _enter(self._wan.sites[place], command)

    def lighthouse_command(self, command: Sequence[str]) -> list[str]:
        """As ``Surroundings.lighthouse_command``."""
        return _enter(self._wan.hub, command)

    def partition(self, pair: Sequence[int], seconds: float) -> None:
        """As ``Surroundings.partition``."""
        self._wan.cut(pair, seconds)

    def cut_off(self, place: int, seconds: float) -> None:
        """As ``Surroundings.cut_off``."""
        for other in {HUB_PLACE, *range(len(self.addresses))} - {place}:
            self._wan.cut((place, other), seconds)

    def bytes_sent(self) -> list[int]:
        """As ``Surroundings.bytes_sent``: of frames."""
        return self._wan.bytes_sent()

    def close(self) -> None:
        """As ``Surroundings.close``."""
        self._wan.close()


def _enter(process: int, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net=/proc/{process}/ns/net", *command]
