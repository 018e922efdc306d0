"""What the kernel tells of a connection (Linux): ``struct tcp_info`` of ``linux/tcp.h``."""

import contextlib
import socket
import struct

_ROUND_TRIP, _SEGMENTS_SENT, _BYTES_SENT = (struct.Struct("=68xI"), struct.Struct("=136xI"), struct.Struct("=200xQ"))
_HEADER_BYTES = 66
"""Around what a segment carries: Ethernet, IPv4, and TCP with time stamps."""


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
