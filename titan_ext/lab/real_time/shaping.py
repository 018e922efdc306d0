"""What a link does to the bytes of TCP connections: rate, distance, windows, loss and outages, as a schedule.

Nothing here waits or looks at a clock: whoever moves the bytes says when it is and is told when they are there. Each
connection has a window, followed chunk by chunk: slow start (RFC 5681), then CUBIC (RFC 9438), halved with every
retransmission timeout of a pause (RFC 2861).
"""

import math
from collections import defaultdict
from collections.abc import Collection
from random import Random

from titan_ext.links.link import Link, Links
from titan_ext.links.tcp import (
    FIRST_WINDOW,
    PAYLOAD_SHARE,
    SEGMENT,
    SHORTEST_PAUSE,
    Transport,
    first_sent,
)

_QUEUE_SECONDS = 0.1
"""What waits before a link at most; then connections to it stand still, as the router before it would lose packets."""
_LARGEST_CHUNK = 64 * 1024
_CHUNK_SECONDS = 0.005
_CUT, _GROWTH = 0.7, 0.4  # CUBIC's beta and C
_RENO = 3 * (1 - _CUT) / (1 + _CUT)


class Shaper:
    """The links of a run, and the interface of each site, which sends no faster than the fastest of its links.

    Args:
        links: between the sites. One more place, ``lighthouse``, is as far from each site as the nearest other one.
        transport: of the connections; what one may have under way.
        seed: of what is lost.
    """

    def __init__(self, links: Links, transport: Transport = Transport(), seed: int = 0) -> None:
        self.links = links
        self.lighthouse = len(links.sites)
        self.sent = [0] * (self.lighthouse + 1)
        """Bytes of payload by place."""
        self.window_bytes = transport.window_bytes
        self._random = Random(f"{seed}/loss")
        self._free: defaultdict[int | tuple[int, int], float] = defaultdict(float)
        self._down: dict[frozenset[int], float] = {}

    def link(self, source: int, target: int) -> Link:
        """What lies between two places."""
        if self.lighthouse not in (source, target):
            return self.links.between(source, target)
        site = min(source, target)
        return Link(self.links.port_rate(site), self.links.lighthouse_rtt(site))

    def flow(self, source: int, target: int) -> "Flow":
        """One direction of a new connection."""
        return Flow(self, source, target)

    def partition(self, pair: Collection[int], until: float) -> None:
        """Nothing passes between two sites until then."""
        self._down[frozenset(pair)] = until

    def queued_seconds(self, source: int, target: int, now: float) -> float:
        """For how long what is sent now would wait for its turn."""
        return max(0.0, self._free[source] - now, self._free[source, target] - now)

    def depart(self, source: int, target: int, size: int, now: float) -> float:
        """Put bytes on the source's interface and then on the link; when the last of them has left that."""
        self.sent[source] += size
        start = now
        if source != self.lighthouse:
            start = max(now, self._free[source])
            self._free[source] = start + _seconds(size, self.links.port_rate(source))
        start = max(start, self._free[source, target])
        start = first_sent(start, self._down.get(frozenset((source, target)), 0.0))
        self._free[source, target] = start + _seconds(size, self.link(source, target).rate)
        return self._free[source, target]

    def lost(self, segments: int, share: float) -> bool:
        """Whether any of some segments is lost."""
        return share > 0 and self._random.random() > (1 - share) ** segments


class Flow:
    """One direction of a connection.

    Args:
        shaper: whose links it goes over.
        source: place from which it sends.
        target: place to which.
    """

    def __init__(self, shaper: Shaper, source: int, target: int) -> None:
        self._shaper, self._ends = shaper, (source, target)
        self.link = shaper.link(source, target)
        self.window = float(FIRST_WINDOW)
        """Bytes that may be under way."""
        self.under_way = 0
        self._threshold = math.inf  # where slow start ends
        self._largest = self._reno = 0.0
        self._lost_at = -math.inf
        self._sent_at = math.inf  # nothing, so far
        self._round_trip = self.link.rtt  # smoothed as TCP does, with what is waited for in the queue
        self._arrives = 0.0

    def room(self, now: float) -> int:
        """Bytes that may be sent now; no more at once than takes some milliseconds."""
        if self._shaper.queued_seconds(*self._ends, now) > _QUEUE_SECONDS:
            return 0
        if not self.under_way:
            self._forget(now)
        at_once = min(_LARGEST_CHUNK, max(SEGMENT, int(self.link.rate / 8 * _CHUNK_SECONDS)))
        return max(0, min(at_once, int(self.window) - self.under_way))

    def seconds_to_room(self, now: float) -> float:
        """After which the queue has room again; 0 where it has: then there is room once bytes are acknowledged."""
        queued = self._shaper.queued_seconds(*self._ends, now)
        return queued - _QUEUE_SECONDS / 2 if queued > _QUEUE_SECONDS else 0.0

    def send(self, size: int, now: float) -> float:
        """Send bytes; when the last of them is there, in order."""
        self.under_way += size
        left = self._shaper.depart(*self._ends, size, now)
        self._sent_at = left
        arrives = left + self.link.rtt / 2
        if self._shaper.lost(math.ceil(size / SEGMENT), self.link.loss):
            arrives += max(self.link.rtt, 0.001)  # sent again, once its successors have been acknowledged
            self._shrink(now)
        self._arrives = max(self._arrives, arrives)
        self._round_trip += (self._arrives + self.link.rtt / 2 - now - self._round_trip) / 8
        return self._arrives

    def end(self, now: float) -> float:
        """When the other side learns that nothing more comes."""
        return max(self._arrives, now + self.link.rtt / 2)

    def acknowledged(self, size: int, now: float) -> None:
        """The sender learns that bytes have been taken."""
        is_limited = 2 * self.under_way >= self.window
        self.under_way -= size
        if is_limited:
            self._grow(size, now)

    def _forget(self, now: float) -> None:
        """Nothing has been sent for a while."""
        idle = now - self._sent_at
        if idle > (timeout := self._round_trip + SHORTEST_PAUSE):
            self._threshold = max(self._threshold, 0.75 * self.window)  # slow start goes on to about where it was
            self.window = max(float(FIRST_WINDOW), self.window * 0.5 ** (idle // timeout))
            self._lost_at += idle
            self._sent_at = now

    def _grow(self, size: int, now: float) -> None:
        if self.window < self._threshold:
            self.window += size
        else:
            self._reno += _RENO * SEGMENT * size / self.window
            inflection = (self._largest / SEGMENT * (1 - _CUT) / _GROWTH) ** (1 / 3)
            cubic = self._largest + SEGMENT * _GROWTH * (now - self._lost_at - inflection) ** 3
            self.window = max(self.window, min(max(cubic, self._reno), self.window + size))
        self.window = min(self.window, self._shaper.window_bytes)

    def _shrink(self, now: float) -> None:
        """At a loss, once for all losses of a round trip."""
        if now - self._lost_at > self.link.rtt:
            self._largest, self._lost_at = self.window, now
            self.window = self._threshold = self._reno = max(2.0 * SEGMENT, _CUT * self.window)


def _seconds(size: int, rate: float) -> float:
    """For bytes of payload at bits a second of frames."""
    return size * 8 / rate / PAYLOAD_SHARE
