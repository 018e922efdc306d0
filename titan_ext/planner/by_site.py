"""Flags of which each gives a time, for all sites or for one."""

from collections.abc import Sequence

from titan_ext.errors import UserError
from titan_ext.links.link import parse_seconds


def seconds_by_site(flag: str, texts: Sequence[str], sites: Sequence[str]) -> dict[str, float]:
    """Seconds above 0 by site: ``12h`` for all sites, ``east=12h`` for one, which counts more.

    Raises:
        UserError: a text cannot be read, names no site, or says anew what another has said.
    """
    found: dict[str, float] = {}
    told: dict[str, str] = {}
    for text in texts:
        name, equals, seconds = text.rpartition("=")
        if equals and name not in sites:
            raise UserError(f"{flag} {text}: must name one of the sites {', '.join(sites)}")
        if name in told:
            raise UserError(f"{flag} {text}: {flag} {told[name]} is of {name or 'all sites'} already")
        told[name] = text
        value = parse_seconds(seconds, f"{flag} {text}")
        if value <= 0:
            raise UserError(f"{flag} {text}: must be above 0")
        for each in [name] if equals else sites:
            if equals or each not in found:
                found[each] = value
    return found
