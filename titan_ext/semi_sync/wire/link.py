"""What a site asks of its link to the others: connections, and a rate it stays below."""

import re
from collections.abc import Mapping

from titan_ext.errors import one_of

MOST_STREAMS = 64
"""Connections for a pair of sites."""

RATE_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
"""Bits a second."""
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z%]*)", re.IGNORECASE)


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
    try:
        bits = quantity(rate, RATE_UNITS, "a rate such as 400mbit or 1gbit")
    except ValueError as error:
        raise ValueError(f"max_rate = {error}") from None
    if bits <= 0:
        raise ValueError(f"max_rate = {rate!r}: must be above 0")
    return bits / 8


def quantity(text: str, units: Mapping[str, float], form: str) -> float:
    """A number with one of these units, such as ``80ms``, times what the unit is worth.

    Args:
        form: what is allowed, for the complaint: ``a rate such as 400mbit``.

    Raises:
        ValueError: it has no number or no unit, or another unit.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or not match[2]:
        raise ValueError(f"{text!r}: must be {form}")
    unit = match[2].lower()
    if unit not in units:
        raise ValueError(f"{text!r}: must be {form}; the unit {one_of(unit, units)}")
    return float(match[1]) * units[unit]
