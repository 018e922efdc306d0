"""How long the sites take to exchange a round, by closed formulas over the links."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from titan_ext.config.cost.outer_cost import LaunchCost, TransferCost
from titan_ext.links.link import Link, Links
from titan_ext.links.tcp import Transport, cold_seconds, connection_rate, port_bytes_per_second, starts_anew
from titan_ext.planner.range import Range

_CONTROL_MESSAGES = 2
"""To all other sites, of a few hundred bytes, one after the other before each reduction, where leaders exchange: the table of
statuses, and weights and norms. Where all ranks do, both leave at once, while the lighthouse is asked."""

LINK_SHARES = (1.05, 1.0, 0.6)
"""Of a link's rate what is had at best, likely and at worst, where nothing was measured."""
TRIP_SHARES = (0.85, 1.0, 1.3)
"""Of the round trips what is taken at best, likely and at worst."""


def ring_seconds(payload: float, sites: int, bytes_per_second: float, latency: float = 0.0) -> float:
    """Seconds of a ring all-reduce: ``2 (sites - 1) / sites`` times the payload, and a latency.

    Photon's RAR (arXiv 2411.02908, appendix) and, for each synced state, the cost model of DES-LOC (arXiv 2505.22549,
    equations 31 to 37).

    Args:
        payload: bytes to be reduced.
        sites: in the ring.
        bytes_per_second: of the slowest link.
        latency: seconds.
    """
    return 2 * payload * (sites - 1) / sites / bytes_per_second + (latency if sites > 1 else 0.0)


def parameter_server_seconds(payload: float, sites: int, bytes_per_second: float) -> float:
    """Seconds in which a server collects and returns the payload of every site (Photon's PS)."""
    return 2 * sites * payload / bytes_per_second if sites > 1 else 0.0


def all_to_all_seconds(payload: float, sites: int, bytes_per_second: float) -> float:
    """Seconds in which every site sends its payload to every other one (Photon's AR)."""
    return (sites - 1) * payload / bytes_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What lies between the sites, and how they use it."""

    links: Links
    transport: Transport = Transport()
    connections: int = 1
    """Pairs of ranks that exchange at once: the ranks of a site, or 1 where a leader exchanges for them."""
    by_leader: bool = False
    """Whether one does, whose rounds begin when the lighthouse has answered."""
    overhead_seconds: float = 0.0
    """What a round takes beside the wire: coding, outer step."""
    step_jitter: float = 0.02
    """Standard deviation of an inner step's time, as a share of it."""
    measured: Range | None = None
    """How many times as long as by the formula a sync has taken in a run, waiting for the last site included; None: no
    run was looked at."""

    @property
    def sites(self) -> int:
        """How many there are."""
        return len(self.links.sites)

    @property
    def lighthouse_rtt(self) -> float:
        """Round-trip time between the lighthouse and the site that is furthest from it."""
        return max(self.links.lighthouse_rtt(site) for site in range(self.sites))

    @property
    def slowest(self) -> Link:
        """The link that carries least."""
        return min(self.links.all(), key=lambda link: connection_rate(link, self.transport, self.connections))

    @property
    def message_seconds(self) -> float:
        """Until all sites have heard of each other: from one end of the longest link to the other."""
        return self.transport.message_trips * max(link.rtt for link in self.links.all())

    def bytes_per_second(self, peers: int) -> float:
        """At which every site sends at once, spread over so many others: what its interface or the slowest link allows."""
        port = min(port_bytes_per_second(self.links, site, self.transport) for site in range(self.sites))
        return min(port, peers * connection_rate(self.slowest, self.transport, self.connections))


def sync_seconds(launch: LaunchCost, wiring: Wiring, period: float, step_seconds: float) -> Range:
    """Seconds from the launch of a round until all have its result.

    Args:
        launch: what travels.
        wiring: over what.
        period: inner steps since the sites last met.
        step_seconds: of the slowest site.
    """
    if wiring.sites < 2:
        return Range.exactly(0.0)
    waiting, idle = _waiting(wiring, period, step_seconds), _idle_seconds(launch, wiring, period, step_seconds)
    if wiring.measured is not None:
        likely = _seconds(launch, wiring, idle, 1.0, 1.0)
        return wiring.measured.map(lambda factor: factor * likely)
    best, usual, worst = (
        _seconds(launch, wiring, idle, *shares) for shares in zip(LINK_SHARES, TRIP_SHARES, strict=True)
    )
    return Range(best, usual + waiting, worst + 2 * waiting)


def _seconds(launch: LaunchCost, wiring: Wiring, idle: float, rate_share: float, trip_share: float) -> float:
    travelling = sum(_transfer_seconds(each, wiring, idle, rate_share, trip_share) for each in launch.transfers)
    quorum, message = trip_share * _quorum_seconds(wiring), trip_share * wiring.message_seconds
    if wiring.by_leader:
        return quorum + _CONTROL_MESSAGES * message + travelling + wiring.overhead_seconds
    return max(quorum, message + travelling) + wiring.overhead_seconds


def _idle_seconds(launch: LaunchCost, wiring: Wiring, period: float, step_seconds: float) -> float:
    """In which nothing leaves for another site: while the last message of a round that no steps hide any more is under way,
    in the inner steps after it, and, before a leader's round, in the quorum of the next."""
    quorum = _quorum_seconds(wiring) if wiring.by_leader else 0.0
    return max(0.0, period - launch.delay) * step_seconds + wiring.message_seconds + quorum


def _quorum_seconds(wiring: Wiring) -> float:
    return wiring.transport.quorum_trips * wiring.lighthouse_rtt


def _transfer_seconds(
    transfer: TransferCost, wiring: Wiring, idle: float, rate_share: float, trip_share: float
) -> float:
    """Buckets follow each other, some at a time: the wire is busy, or waits for the trips of those."""
    if not transfer.site_bytes:
        return 0.0
    turns, slowest, to_each = transfer.turns, wiring.slowest, transfer.site_bytes / transfer.turns.peers
    sending = transfer.site_bytes / turns.buckets / (rate_share * wiring.bytes_per_second(turns.peers))
    trip = trip_share * wiring.message_seconds
    alone = sending + turns.hops * trip
    starting = 0.0
    if starts_anew(slowest, idle):
        starting = cold_seconds(to_each, slowest, wiring.transport, wiring.connections)
        starting -= to_each / connection_rate(slowest, wiring.transport, wiring.connections)
    return starting + turns.before * trip + alone + (turns.buckets - 1) * max(sending, alone / turns.at_most)


def _waiting(wiring: Wiring, period: float, step_seconds: float) -> float:
    """How much later the last of the sites is expected than the mean one, if steps vary independently."""
    latest = NormalDist().inv_cdf(wiring.sites / (wiring.sites + 1))
    return wiring.step_jitter * math.sqrt(period) * step_seconds * latest


def stall_seconds(sync: float, hidden: float) -> float:
    """Of a sync's seconds those that no inner step hides."""
    return max(0.0, sync - hidden)


def utilisation(step_seconds: float, steps: float, stalls: Sequence[float]) -> float:
    """Share of the time in which inner steps are taken.

    Args:
        step_seconds: of an inner step.
        steps: how many.
        stalls: seconds in which none is taken.
    """
    training = step_seconds * steps
    return training / (training + sum(stalls))
