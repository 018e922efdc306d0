"""A router in user space: it carries packets between TUN devices and adds what a long link adds, delay and loss.

It runs as a process of its own, ``python -m titan_ext.links.router``, with the networks to join as JSON on its
command line. Each line of its standard input is answered with a line of what each port has sent; one that is not empty cuts
two ports off from each other first: ``{"ends": [1, 2], "seconds": 3.0}``. The kernel hands over and takes back TCP's packets
whole, up to 64 KiB (segmentation offload); what is counted and lost is the segments that a link would carry.
"""

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from titan_ext.launcher.processes import die_with_parent
from titan_ext.links.namespaces import LINK, enter_network

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_FLAGS = 0x0001 | 0x1000 | 0x4000  # IFF_TUN, IFF_NO_PI, IFF_VNET_HDR
_OFFLOAD = 0x01 | 0x02  # TUN_F_CSUM, TUN_F_TSO4
_OFFLOADED = struct.Struct(
    "=BBHHHH"
)  # virtio's header: flags, kind, bytes of headers, of a segment, where the checksum is
_ETHERNET_BYTES = 14
_QUEUE_SECONDS = 0.1
"""What waits for its turn on a way of limited rate at most."""
_MOST_PACKET = 2**16 + _OFFLOADED.size


@dataclass
class Port:
    """One TUN device: a site's, or that of the hub."""

    host: int
    """Last number of its address."""
    process: int
    """In whose network the device is."""
    down_mbit: float = 0.0
    """Rate of receiving; 0: no limit."""
    delay_ms: float = 0.0
    """Half of its way to the middle, in one direction."""
    descriptor: int = -1
    sent: int = 0
    """Bytes of frames, segment by segment."""
    free_at: float = field(default=0.0)


@dataclass
class Way:
    """What lies between two ports, in one direction."""

    delay_ms: float = 0.0
    mbit: float = 0.0
    """Rate; 0: no limit."""
    loss: float = 0.0
    """Share of the segments that never arrive."""
    free_at: float = 0.0
    down_until: float = 0.0


class Router:
    """Carries packets until its standard input ends.

    Args:
        ports: one for each namespace.
        loss: share of the segments that never arrive.
        ways: by their two ports; others are as long as the ports say, and have no limit.
    """

    def __init__(self, ports: list[Port], loss: float, ways: Mapping[tuple[int, int], Way]) -> None:
        self._ports = {port.host: port for port in ports}
        self._ways = {
            (source.host, target.host): ways.get((source.host, target.host))
            or Way(delay_ms=source.delay_ms + target.delay_ms, loss=loss)
            for source in ports
            for target in ports
        }
        self._chance = random.Random(1)
        self._under_way: list[tuple[float, int, Port, bytes]] = []
        self._count = 0
        for port in ports:
            port.descriptor = _open_device(port.process)

    def run(self) -> None:
        """Until the parent has gone."""
        by_descriptor = {port.descriptor: port for port in self._ports.values()}
        poll = select.poll()
        for descriptor in (sys.stdin.fileno(), *by_descriptor):
            poll.register(descriptor, select.POLLIN)
        while True:
            wait = None if not self._under_way else max(0.0, 1000 * (self._under_way[0][0] - time.monotonic()))
            for descriptor, _ in poll.poll(wait):
                if descriptor in by_descriptor:
                    self._take(by_descriptor[descriptor])
                elif line := sys.stdin.readline():
                    if line.strip():
                        self._cut(**json.loads(line))
                    print(json.dumps({port.host: port.sent for port in self._ports.values()}), flush=True)
                else:
                    return
            self._deliver()

    def _take(self, source: Port) -> None:
        for _ in range(64):  # then what is due is delivered
            try:
                packet = os.read(source.descriptor, _MOST_PACKET)
            except BlockingIOError:
                return
            target = self._ports.get(packet[_OFFLOADED.size + 19])
            if packet[_OFFLOADED.size] >> 4 != 4 or target is None:
                continue
            size = frame_bytes(packet)
            source.sent += size
            now, way = time.monotonic(), self._ways[source.host, target.host]
            if now < way.down_until or way.free_at > now + _QUEUE_SECONDS:
                continue  # lost
            if way.mbit:
                way.free_at = max(now, way.free_at) + size * 8 / (way.mbit * 1e6)
            arrives = max(now, way.free_at) + way.delay_ms / 1000
            if target.down_mbit:
                arrives = target.free_at = max(arrives, target.free_at) + size * 8 / (target.down_mbit * 1e6)
            for piece in survivors(packet, way.loss, self._chance) if way.loss else (packet,):
                self._count += 1
                heapq.heappush(self._under_way, (arrives, self._count, target, piece))

    def _cut(self, ends: tuple[int, int], seconds: float) -> None:
        for source, target in (ends, ends[::-1]):
            self._ways[source, target].down_until = time.monotonic() + seconds

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, target, packet = heapq.heappop(self._under_way)
            os.write(target.descriptor, packet)


def frame_bytes(packet: bytes) -> int:
    """Bytes that a link carries for a packet with virtio's header: each segment has headers of its own."""
    _, kind, headers, segment, _, _ = _OFFLOADED.unpack_from(packet)
    size = len(packet) - _OFFLOADED.size
    if not kind:
        return size + _ETHERNET_BYTES
    headers = _tcp_headers(packet)
    segments = -(-(size - headers) // segment)
    return size - headers + segments * (headers + _ETHERNET_BYTES)


def survivors(packet: bytes, loss: float, chance: random.Random) -> list[bytes]:
    """What is left of a packet whose segments are each lost with a probability: the runs between those lost."""
    _, kind, _, segment, _, _ = _OFFLOADED.unpack_from(packet)
    size = len(packet) - _OFFLOADED.size
    if not kind:
        return [] if chance.random() < loss else [packet]
    headers = _tcp_headers(packet)
    count = -(-(size - headers) // segment)
    kept = [chance.random() >= loss for _ in range(count)]
    if all(kept):
        return [packet]
    pieces, first = [], 0
    while first < count:
        if not kept[first]:
            first += 1
            continue
        last = first
        while last + 1 < count and kept[last + 1]:
            last += 1
        pieces.append(_cut(packet, headers, first * segment, min((last + 1) * segment, size - headers)))
        first = last + 1
    return pieces


def _cut(packet: bytes, headers: int, start: int, stop: int) -> bytes:
    """The packet with the payload bytes ``start`` to ``stop`` alone.

    TCP's checksum is not there yet: in its place stands that of the pseudo-header, which contains the length.
    """
    flags, kind, _, segment, csum_start, csum_offset = _OFFLOADED.unpack_from(packet)
    body = _OFFLOADED.size
    one = stop - start <= segment
    head = bytearray(packet[: body + headers])
    _OFFLOADED.pack_into(
        head, 0, flags, 0 if one else kind, 0 if one else headers, 0 if one else segment, csum_start, csum_offset
    )
    internet = (head[body] & 15) * 4
    size = headers + stop - start
    struct.pack_into("!H", head, body + 2, size)
    struct.pack_into("!H", head, body + 10, 0)
    struct.pack_into("!H", head, body + 10, ~_sum16(bytes(head[body : body + internet])) & 0xFFFF)
    (sequence,) = struct.unpack_from("!I", head, body + internet + 4)
    struct.pack_into("!I", head, body + internet + 4, (sequence + start) & 0xFFFFFFFF)
    pseudo = bytes(head[body + 12 : body + 20]) + struct.pack("!HH", 6, size - internet)
    struct.pack_into("!H", head, body + csum_start + csum_offset, _sum16(pseudo))
    return bytes(head) + packet[body + headers + start : body + headers + stop]


def _tcp_headers(packet: bytes) -> int:
    body = _OFFLOADED.size
    internet = (packet[body] & 15) * 4
    return internet + (packet[body + internet + 12] >> 4) * 4


def _sum16(content: bytes) -> int:
    total = sum(struct.unpack(f"!{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _open_device(process: int) -> int:
    """A TUN device in a process's network; it lives as long as its descriptor."""
    enter_network(process)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", LINK.encode(), _FLAGS))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _OFFLOAD)
    return descriptor


def main() -> None:
    """Open the devices, say so, and carry packets."""
    die_with_parent()
    os.nice(-10)  # late packets would be a longer link
    with contextlib.suppress(OSError):  # where each session has its own share of the processors, that is what counts
        Path("/proc/self/autogroup").write_text("-10")
    described = json.loads(sys.argv[1])
    ways = {(source, target): Way(**way) for *ends, way in described["ways"] for source, target in (ends, ends[::-1])}
    router = Router([Port(**port) for port in described["ports"]], described["loss"], ways)
    print("ready", flush=True)
    router.run()


if __name__ == "__main__":
    main()
