"""Flags of which each gives a time, for all sites or for one."""

from collections.abc import Sequence

from titan_ext.errors import UserError
from titan_ext.links.link import parse_seconds


def seconds_by_site(flag: str, texts: Sequence[str], sites: Sequence[str]) -> dict[str, float]:
    """Seconds above 0 by site: ``12h`` for all sites, ``east=12h`` for one, which counts more.

    Raises:
        UserError: a text cannot be read or names no site.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, equals, seconds = text.rpartition("=")
        if equals and name not in sites:
            raise UserError(f"{flag} {text}: must name one of the sites {', '.join(sites)}")
        value = parse_seconds(seconds, f"{flag} {text}")
        if value <= 0:
            raise UserError(f"{flag} {text}: must be above 0")
        for each in [name] if equals else sites:
            if equals or each not in found:
                found[each] = value
    return found
