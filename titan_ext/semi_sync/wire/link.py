"""What a site asks of its link to the others: connections, and a rate it stays below."""

import re

MOST_STREAMS = 64
"""Connections for a pair of sites."""

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", re.IGNORECASE)


def number_of_streams(streams: int | str) -> int:
    """Connections for a pair of sites; 0 where their distance decides.

    Raises:
        ValueError: it is neither "auto" nor a number in range.
    """
    if streams == "auto":
        return 0
    if not isinstance(streams, int) or isinstance(streams, bool) or not 1 <= streams <= MOST_STREAMS:
        raise ValueError(f'streams = {streams!r}: must be "auto" or a number from 1 to {MOST_STREAMS}')
    return streams


def bytes_per_second(rate: str | None) -> float:
    """A rate such as "400mbit", in bytes a second; 0 for none.

    Raises:
        ValueError: it is no rate.
    """
    if rate is None:
        return 0.0
    match = _RATE.fullmatch(rate.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f'max_rate = {rate!r}: must be a number with kbit, mbit or gbit, such as "400mbit"')
    return float(match[1]) * _UNITS[match[2].lower()] / 8
