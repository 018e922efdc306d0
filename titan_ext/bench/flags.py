"""Flags of benchmarks and experiments: numbers with a least value, and errors that name the flag."""

import argparse
from collections.abc import Mapping

from titan_ext.errors import UserError

Number = int | float
Numbers = Mapping[str, tuple[Number, Number, str]]
"""Default, least value and help of flags by key; the default's type is the flag's."""


def flag(key: str) -> str:
    """``--sync-every`` for ``sync_every``."""
    return f"--{key.replace('_', '-')}"


def require_flag(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raises UserError, naming the flag, its value and what is allowed, unless that holds."""
    if not holds:
        raise UserError(f"{flag(key)} {_text(value)}: must be {allowed}")


def add_numbers(parser: argparse.ArgumentParser, numbers: Numbers) -> None:
    """Add the flags."""
    for key, (default, _, text) in numbers.items():
        parser.add_argument(flag(key), type=type(default), default=default, help=f"{text} (default: {_text(default)})")


def check_numbers(options: argparse.Namespace, numbers: Numbers) -> None:
    """Raises UserError if a flag is below its least value."""
    for key, (_, least, _) in numbers.items():
        require_flag(getattr(options, key) >= least, key, getattr(options, key), f"at least {_text(least)}")


def listed_numbers(key: str, text: str, least: float, most: float = 1e5) -> list[float]:
    """The numbers of a comma-separated flag.

    Raises:
        UserError: one is none, or out of range.
    """
    try:
        numbers = [float(each) for each in text.split(",")]
    except ValueError:
        raise UserError(f"{flag(key)} {text}: must be numbers, such as 50,200") from None
    in_range = all(least <= number <= most for number in numbers)
    require_flag(in_range, key, text, f"numbers from {least:g} to {most:g}")
    return numbers


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
