"""The router's arithmetic on packets, without devices."""

import random
import struct

from titan_ext.links.router import frame_bytes, survivors

SEGMENT, HEADERS = 1448, 52
SEQUENCE = 2**32 - 2000


def packet(payload: bytes) -> bytes:
    """IPv4 and TCP as the kernel hands them over: options, and a checksum of the pseudo-header alone."""
    size = HEADERS + len(payload)
    offloaded = struct.pack("=BBHHHH", 1, 1, HEADERS, SEGMENT, 20, 16)
    internet = struct.pack("!BBHHHBBH4s4s", 0x45, 0, size, 7, 0, 64, 6, 0, bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2]))
    tcp = struct.pack("!HHIIBBHHH12x", 1, 2, SEQUENCE, 9, 8 << 4, 0x10, 100, 0, 0)
    return offloaded + internet + tcp + payload


def folded(content: bytes) -> int:
    total = sum(struct.unpack(f"!{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_each_segment_has_headers_on_the_link() -> None:
    assert frame_bytes(packet(bytes(3 * SEGMENT + 1))) == 3 * SEGMENT + 1 + 4 * (HEADERS + 14)


def test_what_survives_are_the_bytes_between_those_lost() -> None:
    payload = random.Random(0).randbytes(20 * SEGMENT + 100)
    pieces = survivors(packet(payload), 0.3, random.Random(5))
    assert 1 < len(pieces) < 20
    for piece in pieces:
        body = piece[10:]
        content = body[HEADERS:]
        (sequence,) = struct.unpack_from("!I", body, 24)
        start = (sequence - SEQUENCE) % 2**32
        assert start % SEGMENT == 0 and payload[start : start + len(content)] == content
        assert struct.unpack_from("!H", body, 2)[0] == len(body)
        assert folded(body[:20]) == 0xFFFF, "the Internet header's checksum"
        pseudo = body[12:20] + struct.pack("!HH", 6, len(body) - 20)
        assert struct.unpack_from("!H", body, 36)[0] == folded(pseudo)
        assert struct.unpack_from("=BBHHHH", piece)[1] == (len(content) > SEGMENT)


def test_nothing_is_lost_without_loss_and_everything_with_all() -> None:
    whole = packet(bytes(5 * SEGMENT))
    assert survivors(whole, 0.0, random.Random(0)) == [whole]
    assert survivors(whole, 1.0, random.Random(0)) == []
