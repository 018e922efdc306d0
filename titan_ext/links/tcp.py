"""How long TCP takes for a message, from the link and from what the connections have learnt of it.

A fluid model of each connection: it begins with ten segments and doubles what it has under way with each round trip
(slow start, RFC 5681), up to what the link, the receiver's window or loss allows (CUBIC's average window, RFC 9438
section 5.1). After a pause it begins anew (RFC 2861, Linux's default).
"""

import math
from dataclasses import dataclass

from titan_ext.links.link import Link, Links
from titan_ext.replica.streams.distance import streams_for

SEGMENT = 1448  # bytes of payload in a full Ethernet packet with TCP's timestamps
PAYLOAD_SHARE = SEGMENT / 1514
"""Of the bytes of such a packet, from the Ethernet header on."""
FIRST_WINDOW = 10 * SEGMENT  # RFC 6928
SHORTEST_PAUSE = 0.2  # seconds; the least retransmission timeout of Linux, doubled with each


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """How messages travel between two ranks: over several TCP connections, which share each of them."""

    streams: int = 0
    """Connections; 0: by the distance."""
    peers: int = 1
    """Other sites; to more of them there are fewer connections each, if it is by distance."""
    max_rate: float = 0.0
    """Bytes a second that a site sends at most; 0: no limit."""
    window_bytes: float = 3 * 2**20
    """What one connection may have under way: half of Linux's largest receive buffer (net.ipv4.tcp_rmem, 6 MiB)."""
    message_trips: float = 0.5
    """Round trips until a message's first byte is there; its receiver need not say that it is ready."""
    quorum_trips: float = 1.0
    """Round trips to the lighthouse and back in which a quorum comes about, with all sites there."""
    regroup_trips: float = 8.0
    """Round trips in which the sites of a new quorum connect to each other: to the store, to tell and read addresses
    there, to the peer, and all further connections to it at once."""

    def streams_over(self, link: Link) -> int:
        """Connections over a link."""
        return self.streams or streams_for(link.rtt, self.peers)


def connection_rate(link: Link, transport: Transport, connections: int = 1) -> float:
    """Payload bytes a second between two sites, once the connections are up to speed.

    Args:
        link: between the sites.
        transport: how messages travel.
        connections: pairs of ranks that exchange at once, each with streams of its own.
    """
    rate = min(link.rate / 8 * PAYLOAD_SHARE, transport.max_rate or math.inf)
    if link.rtt > 0:
        window = min(transport.window_bytes, _lossy_window(link))
        rate = min(rate, connections * transport.streams_over(link) * window / link.rtt)
    return rate


def starts_anew(link: Link, idle_seconds: float) -> bool:
    """Whether a connection that has been idle for so long has forgotten how fast it may send."""
    return idle_seconds > max(SHORTEST_PAUSE, 2 * link.rtt)


def first_sent(start: float, up: float) -> float:
    """When what is sent at ``start`` over a link that is down until ``up`` is sent for the first time after that."""
    retry = SHORTEST_PAUSE
    while start < up:
        start += retry
        retry *= 2
    return start


def port_bytes_per_second(links: Links, site: int, transport: Transport) -> float:
    """Payload bytes a second that a site sends in all."""
    return min(links.port_rate(site) / 8 * PAYLOAD_SHARE, transport.max_rate or math.inf)


def _lossy_window(link: Link) -> float:
    """Bytes that CUBIC has under way on average, or Reno where that is more (RFC 9438, section 5.1 and 4.3)."""
    if link.loss <= 0:
        return math.inf
    reno = math.sqrt(1.5 / link.loss)
    cubic = (0.4 * (3 + 0.7) / (4 * (1 - 0.7))) ** 0.25 * (link.rtt / link.loss) ** 0.75
    return SEGMENT * max(1.0, reno, cubic)


@dataclass(slots=True)
class Connection:
    """What lies between two sites for a message after the other: how fast it may send, and since when it is idle.

    Args:
        link: between the sites.
        transport: how messages travel.
        connections: pairs of ranks that exchange at once.
    """

    link: Link
    transport: Transport
    connections: int = 1
    _window: float = 0.0
    _idle_since: float = -math.inf

    def seconds_to_send(self, payload: float, now: float) -> float:
        """Seconds from the first byte's departure to the last one's; the window grows by what is sent.

        Args:
            payload: bytes.
            now: seconds on any clock that does not go back.
        """
        rate = connection_rate(self.link, self.transport, self.connections)
        rtt, first = self.link.rtt, float(FIRST_WINDOW * self.transport.streams_over(self.link) * self.connections)
        if starts_anew(self.link, now - self._idle_since):
            self._window = first
        seconds, left = 0.0, float(payload)
        # A window a round trip, until the windows fill the link.
        while left > self._window and self._window < rate * rtt:
            seconds += rtt
            left -= self._window
            self._window *= 2
        seconds += left / rate
        self._window = max(self._window, min(self._window + left, rate * rtt))
        self._idle_since = now + seconds
        return seconds


def cold_seconds(payload: float, link: Link, transport: Transport, connections: int = 1) -> float:
    """Seconds to send ``payload`` bytes over connections that have been idle."""
    return Connection(link, transport, connections).seconds_to_send(payload, 0.0)
