"""The network of a rehearsal: messages on links, one after the other, in virtual time."""

from collections import defaultdict
from collections.abc import Callable, Collection
from random import Random

from titan_ext.lab.simulation import Simulation
from titan_ext.links.link import Links
from titan_ext.links.tcp import Connection, Transport, connection_rate, first_sent, port_bytes_per_second

QUEUE_SECONDS = 0.1
"""What commonly waits on an interface or before a link."""


class Network:
    """Carries messages between sites.

    A site's interface sends no faster than the fastest of its links, and a link carries a message after the other.

    Args:
        simulation: whose time passes.
        links: between the sites.
        transport: how messages travel.
        connections: pairs of ranks of two sites that exchange at once.
        jitter: standard deviation of a message's time on the way, as a share of the round trip.
        seed: of that jitter.
        queue_seconds: what of the sites' messages is before one of another connection on an interface at most: TCP hands
            packets over as they leave, and the connections take turns. Infinite: each waits for all before it.
    """

    def __init__(
        self,
        simulation: Simulation,
        links: Links,
        transport: Transport,
        *,
        connections: int = 1,
        jitter: float = 0.0,
        seed: int = 0,
        queue_seconds: float = QUEUE_SECONDS,
    ) -> None:
        self.links, self.transport = links, transport
        self._queue_seconds = queue_seconds
        self.sent = [0.0] * len(links.sites)
        """Bytes by site."""
        self.fetched = [0.0] * len(links.sites)
        """Of those the ones of shared state that others fetched."""
        self.told = [0.0] * len(links.sites)
        """Of those the ones that the lighthouse got."""
        self._simulation = simulation
        self._connections = connections
        self._jitter, self._random = jitter, Random(f"{seed}/network")
        self._pairs: dict[tuple[int, int], Connection] = {}
        self._free: defaultdict[tuple[int, int | None], float] = defaultdict(float)
        self._down: dict[frozenset[int], float] = {}

    def send(self, source: int, target: int, payload: float, arrived: Callable[[], None]) -> None:
        """Send ``payload`` bytes; ``arrived`` is called when the last of them is there."""
        port, pair = (source, None), (source, target)
        start = max(self._simulation.now, self._free[port])
        # A link that is busy or down holds up nothing that goes elsewhere.
        self._free[port] = start + payload / port_bytes_per_second(self.links, source, self.transport)
        start = first_sent(max(start, self._free[pair]), self._down.get(frozenset(pair), 0.0))
        seconds = self._connection(pair).seconds_to_send(payload, start)
        self._free[pair] = start + seconds
        self.sent[source] += payload
        self._simulation.at(start + seconds + self._trip(source, target), arrived)

    def seconds_to_lighthouse(self, site: int, payload: float) -> float:
        """Seconds until bytes that a site sends the lighthouse, over a connection of its own, are there."""
        now, port = self._simulation.now, (site, None)
        seconds = payload / port_bytes_per_second(self.links, site, self.transport)
        ahead = max(0.0, self._free[port] - now)
        self._free[port] = now + ahead + seconds
        self.sent[site] += payload
        self.told[site] += payload
        return min(ahead, self._queue_seconds) + seconds + self.links.lighthouse_rtt(site) / 2

    def seconds_to_fetch(self, source: int, target: int, payload: float) -> float:
        """Seconds in which a site sends another one bytes beside all else, at the link's rate."""
        link = self.links.between(source, target)
        self.sent[source] += payload
        self.fetched[source] += payload
        return payload / connection_rate(link, self.transport, self._connections) + link.rtt

    def partition(self, pair: Collection[int], until: float) -> None:
        """Nothing passes between two sites until then."""
        self._down[frozenset(pair)] = until

    def _connection(self, pair: tuple[int, int]) -> Connection:
        if pair not in self._pairs:
            self._pairs[pair] = Connection(self.links.between(*pair), self.transport, self._connections)
        return self._pairs[pair]

    def _trip(self, source: int, target: int) -> float:
        trip = self.transport.message_trips * self.links.between(source, target).rtt
        return trip * max(0.0, 1 + self._random.gauss(0.0, self._jitter)) if self._jitter else trip
