"""Links between sites, and how users write them: ``1gbit,80ms,0.1%``, ``east-west=1gbit,80ms``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_ext.errors import UserError
from titan_ext.semi_sync.wire.link import RATE_UNITS, quantity

_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
LINK_FORM = "RATE[,ROUND-TRIP TIME[,LOSS]] such as 1gbit,80ms or 200mbit,40ms,0.1%"


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between two sites, in either direction."""

    rate: float
    """Bits a second."""
    rtt: float = 0.0
    """Round-trip time in seconds."""
    loss: float = 0.0
    """Share of the packets that are lost."""

    def __str__(self) -> str:
        loss = f", {self.loss:.3g} lost" if self.loss else ""
        return f"{rate_text(self.rate)}, {1000 * self.rtt:g} ms{loss}"


class Links:
    """The link of every pair of sites.

    Args:
        sites: their names.
        pairs: links by the names of both sites, in either order.
        default: of pairs that are not named; None: there must be none.

    Raises:
        UserError: a pair has no link.
    """

    def __init__(self, sites: Sequence[str], pairs: Mapping[frozenset[str], Link], default: Link | None) -> None:
        self.sites = list(sites)
        self._table = [[pairs.get(frozenset((one, other)), default) for other in sites] for one in sites]
        for place, one in enumerate(sites):
            for other in sites[place + 1 :]:
                if default is None and frozenset((one, other)) not in pairs:
                    raise UserError(
                        f"--link: none for {one}-{other}; add --link {one}-{other}={LINK_FORM.split(' such')[0]}, "
                        "or one without names for all other pairs"
                    )

    @classmethod
    def alike(cls, sites: Sequence[str], link: Link) -> "Links":
        """One link for all pairs."""
        return cls(sites, {}, link)

    def between(self, one: int, other: int) -> Link:
        """The link of two sites, by their places."""
        link = self._table[one][other]
        assert link is not None, "checked at the start"
        return link

    def of(self, site: int) -> list[Link]:
        """All links of a site."""
        return [self.between(site, other) for other in range(len(self.sites)) if other != site]

    def lighthouse_rtt(self, site: int) -> float:
        """Round-trip time between a site and the lighthouse, which is at the best connected place."""
        return min((link.rtt for link in self.of(site)), default=0.0)

    def port_rate(self, site: int) -> float:
        """Bits a second that a site's interface can send in all: the rate of the fastest of its links."""
        return max((link.rate for link in self.of(site)), default=float("inf"))

    def all(self) -> list[Link]:
        """The links of all pairs."""
        return [self.between(one, other) for one in range(len(self.sites)) for other in range(one)]

    def describe(self) -> str:
        """The links in a few words."""
        found: dict[Link, list[str]] = {}
        for place, one in enumerate(self.sites):
            for other in range(place + 1, len(self.sites)):
                found.setdefault(self.between(place, other), []).append(f"{one}-{self.sites[other]}")
        if len(found) == 1:
            return f"{next(iter(found))} between all sites"
        return "; ".join(f"{', '.join(pairs)}: {link}" for link, pairs in found.items())


def parse_links(
    texts: Sequence[str], sites: Sequence[str], measured: Mapping[frozenset[str], Link] | None = None
) -> Links:
    """The links that ``--link`` flags give, and those that were measured.

    Raises:
        UserError: a flag cannot be read, names no pair of ``sites``, or a pair has no link.
    """
    pairs = dict(measured or {})
    default = None
    for text in texts:
        names, equals, link = text.rpartition("=")
        if not equals:
            if default is not None:
                raise UserError(f"--link {text}: there is one for all pairs already")
            default = parse_link(link)
            continue
        pair = parse_pair(names, sites)
        if pair in pairs:
            raise UserError(f"--link {text}: {names} has one already")
        pairs[pair] = parse_link(link, of=f"{names}=")
    return Links(sites, pairs, default)


def parse_link(text: str, of: str = "") -> Link:
    """A link such as ``200mbit,40ms,0.1%``.

    Raises:
        UserError: naming what cannot be read and the form.
    """
    parts = [part.strip() for part in text.split(",")]
    where = f"--link {of}{text}"
    if not 1 <= len(parts) <= 3:
        raise UserError(f"{where}: must be {LINK_FORM}")
    rate = parse_rate(parts[0], where)
    rtt = parse_seconds(parts[1], where) if len(parts) > 1 else 0.0
    loss = parse_share(parts[2], where) if len(parts) > 2 else 0.0
    return Link(rate, rtt, loss)


def parse_rate(text: str, where: str) -> float:
    """Bits a second from ``200mbit``; raises UserError that begins with ``where``."""
    rate = _number(text, RATE_UNITS, where, "a rate such as 200mbit or 1gbit")
    if rate <= 0:
        raise UserError(f"{where}: the rate must be above 0")
    return rate


def parse_seconds(text: str, where: str) -> float:
    """Seconds from ``80ms``, ``2min`` or ``12h``; raises UserError that begins with ``where``."""
    return _number(text, _TIMES, where, "a time such as 80ms, 120s or 12h")


def parse_share(text: str, where: str) -> float:
    """A share below 1 from ``0.1%``; raises UserError that begins with ``where``."""
    share = _number(text, {"%": 0.01}, where, "a loss such as 0.1%")
    if share >= 1:
        raise UserError(f"{where}: the loss {text} must be below 100%")
    return share


def rate_text(rate: float) -> str:
    """``200 Mbit/s`` for 2e8."""
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.3g} bit/s"


def _number(text: str, units: Mapping[str, float], where: str, form: str) -> float:
    try:
        return quantity(text, units, form)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def parse_pair(names: str, sites: Sequence[str]) -> frozenset[str]:
    """The two sites of ``east-west``, whose names may have hyphens themselves.

    Raises:
        UserError: they are not two of ``sites``.
    """
    cuts = [place for place, letter in enumerate(names) if letter == "-"]
    found = {
        frozenset((names[:cut], names[cut + 1 :]))
        for cut in cuts
        if names[:cut] in sites and names[cut + 1 :] in sites and names[:cut] != names[cut + 1 :]
    }
    if len(found) == 1:
        return found.pop()
    problem = "could be two pairs; rename a site" if found else f"must name two of the sites {', '.join(sites)}"
    raise UserError(f"--link {names}=…: {problem}, joined by a hyphen")
