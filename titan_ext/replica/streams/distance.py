"""How far a peer is and what was sent to it, as the kernel tells (Linux: ``struct tcp_info`` of ``linux/tcp.h``)."""

import contextlib
import math
import socket
import struct

_ROUND_TRIP, _SEGMENTS_SENT, _BYTES_SENT = (struct.Struct("=68xI"), struct.Struct("=136xI"), struct.Struct("=200xQ"))
_HEADER_BYTES = 66
"""Around what a segment carries: Ethernet, IPv4, and TCP with time stamps."""

_ASSUMED_BYTES_PER_SECOND = 125e6
_WINDOW_BYTES = 2**20
"""Under way over one connection: about a quarter of what common kernels let its buffers grow to by themselves, since it has
less after a start, a pause or a lost packet, and the others then fill the link."""
_MOST_BY_DISTANCE = 16


def streams_for(round_trip: float, peers: int = 1) -> int:
    """Connections to each of some peers that keep a link of 1 Gbit/s full at a distance of ``round_trip`` seconds; at least
    two."""
    streams = math.ceil(round_trip * _ASSUMED_BYTES_PER_SECOND / _WINDOW_BYTES / peers)
    return min(_MOST_BY_DISTANCE, max(2, streams))


def round_trip_seconds(connection: socket.socket) -> float:
    """The smoothed round-trip time; 0 where the kernel does not tell."""
    (microseconds,) = _read(connection, _ROUND_TRIP)
    return microseconds / 1e6


def frame_bytes_sent(connection: socket.socket) -> int:
    """Bytes of all frames sent over a connection, headers, answers and repetitions included; 0 where the kernel does not tell."""
    (segments,), (payload,) = _read(connection, _SEGMENTS_SENT), _read(connection, _BYTES_SENT)
    return payload + segments * _HEADER_BYTES


def _read(connection: socket.socket, part: struct.Struct) -> tuple[int]:
    with contextlib.suppress(OSError, AttributeError, struct.error):
        return part.unpack_from(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    return (0,)
