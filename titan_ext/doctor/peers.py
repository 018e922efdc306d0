"""Checks between sites: with the doctors of the others before a run, with the members of one that goes on."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from titan_ext.doctor.finding import Finding, Level, ok
from titan_ext.doctor.machine import versions
from titan_ext.doctor.probe import Link, Meeting, Peer, Probe, dial, measure, say_done
from titan_ext.replica.address import lighthouse_url
from titan_ext.replica.authenticated_http import Refused
from titan_ext.replica.membership.lighthouse_page import LighthousePage, Member, read_lighthouse_page
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.semi_sync.round.differences import InCommon, differences

_SKEW_SECONDS = 2.0
_FAREWELL_SECONDS = 30.0
_ALIVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Links:
    """What is known of the ways to other sites."""

    findings: list[Finding]
    bits_per_second: float | None = None
    """Of the slowest."""
    round_trip_seconds: float | None = None
    """Of the longest."""


def check_lighthouse(page: LighthousePage, names: Sequence[str], own: str) -> list[Finding]:
    """Who is there already."""
    alive = page.alive(_ALIVE_SECONDS)
    strangers = sorted({each.name for each in alive} - set(names))
    if strangers:
        what = f"{', '.join(strangers)} of another run use(s) this lighthouse"
        why = "two runs that meet refuse each other, and neither goes on"
        return [Finding("lighthouse", Level.PROBLEM, what, why, '[replica] lighthouse = "host:another port"')]
    if own in {each.name for each in alive}:
        what = f'a site named "{own}" is there already'
        why = "a round refuses two sites of one name"
        return [Finding("lighthouse", Level.PROBLEM, what, why, f'[[site]] name = "another than {own}"')]
    there = f"the run goes on with {', '.join(sorted(each.name for each in alive))}" if alive else "nobody is there yet"
    return [ok("lighthouse", there)]


def check_region_lighthouse(url: str | None) -> list[Finding]:
    """Whether there is one where the sites of a region are to meet, if they are to."""
    if url is None:
        return []
    try:
        read_lighthouse_page(lighthouse_url(url))
    except OSError as error:
        what = f"{url} does not answer: {getattr(error, 'reason', error)}"
        why = "the averages of the region wait for it"
        mend = "titan-ext lighthouse --min-sites 1 near to the region's sites, and [region.replica] region_lighthouse"
        return [Finding("region's lighthouse", Level.PROBLEM, what, why, mend)]
    return [ok("region's lighthouse", f"answers at {url}")]


def check_members(members: Sequence[Member], own: str) -> Links:
    """Dial what the members of a run that goes on listen on, and take part in nothing."""
    from titan_ext.replica.torchft_internals import state_address

    findings, trips = [], []
    for member in members:
        if member.name == own:
            continue
        ways = {"manager": _address(member.manager), "store": _address(f"tcp://{member.store}")}
        try:
            ways["state"] = _address(state_address(member.manager, 0, timedelta(seconds=5)))
        except (OSError, RuntimeError, ValueError) as error:
            findings.append(_unreachable(member.name, "state", str(error).splitlines()[0]))
        for what, (host, port) in ways.items():
            seconds, problem = dial(host, port)
            if problem is None:
                trips.append(seconds)
                findings.append(ok(f"to {member.name}", f"{what} at {host}:{port}, {1000 * seconds:.1f} ms to connect"))
            else:
                findings.append(_unreachable(member.name, what, f"{host}:{port}: {problem}"))
    return Links(findings, round_trip_seconds=max((each for each in trips if each is not None), default=None))


def meet(
    lighthouse: str,
    site: Any,
    host: str,
    in_common: InCommon,
    names: Sequence[str],
    secret: Secret | None,
    seconds: float,
) -> Links:
    """Wait for the doctors of the other sites, and measure the way to each.

    Args:
        lighthouse: its URL.
        site: this one.
        host: that it advertises.
        in_common: what has to be equal at all sites.
        names: of all sites.
        secret: the run's.
        seconds: to wait for the others.
    """
    others = set(names) - {site.name}
    about = {"name": site.name, "versions": versions(), "in_common": in_common.encoded().decode()}
    with Meeting(lighthouse, site.name) as meeting:
        probe = Probe(site.config.replica.state_port, about, meeting.others, secret)
        try:
            meeting.begin(host, probe.port)
            peers = meeting.wait_for(others, seconds)
            links, findings, strangers = _measured(peers, site.name, secret)
            for peer in peers.values():
                say_done(peer, site.name, secret)
            _wait_for_farewells(probe, peers.keys() - strangers, strangers)
        finally:
            probe.stop()
    findings += [_absent(name) for name in sorted(others - peers.keys())]
    for name, link in links.items():
        findings += _of_link(name, link, about)
    rates, trips = (
        [each.bits_per_second for each in links.values()],
        [each.round_trip_seconds for each in links.values()],
    )
    return Links(findings, min(rates, default=None), max(trips, default=None))


def _measured(
    peers: Mapping[str, Peer], own: str, secret: Secret | None
) -> tuple[dict[str, Link], list[Finding], set[str]]:
    """The links, what was found of those that could not be measured, and who does not hold the secret."""
    links: dict[str, Link] = {}
    findings: list[Finding] = []
    strangers: set[str] = set()
    for name, peer in sorted(peers.items()):
        try:
            links[name] = measure(peer, own, secret)
        except (OSError, ValueError, KeyError) as error:
            findings.append(_unreachable(name, "doctor", f"{peer.host}:{peer.port}: {error}"))
            strangers |= {name} if isinstance(error, Refused) else set()
    return links, findings, strangers


def _of_link(name: str, link: Link, about: Mapping[str, Any]) -> list[Finding]:
    check = f"to {name}"
    rate, trip = link.bits_per_second / 1e6, 1000 * link.round_trip_seconds
    mtu = f", MTU {link.mtu}" if link.mtu else ""
    found = [
        ok(
            check,
            f"{rate:,.{0 if rate > 100 else 1}f} Mbit/s from there over one connection, {trip:.1f} ms there and back{mtu}",
        )
    ]
    if link.problem_back:
        why = "sites connect to each other in both directions"
        what = f"{name} cannot reach this site: {link.problem_back}"
        mend = "open the port to it, or [replica] interface / hostname = what it reaches; replica.state_port fixes the port"
        found.append(Finding(check, Level.PROBLEM, what, why, mend))
    if abs(link.skew_seconds) > _SKEW_SECONDS:
        what = f"the clock of {name} is {abs(link.skew_seconds):.1f} s {'ahead' if link.skew_seconds > 0 else 'behind'}"
        why = "`titan-ext watch` tells when and why a site was away by the clocks; certificates may not be valid yet"
        found.append(Finding("clocks", Level.WARNING, what, why, "timedatectl set-ntp true, at both"))
    return found + _compare(name, link.about, about)


def _compare(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Finding]:
    found = []
    versions_differ = _differences(theirs.get("versions", {}), ours["versions"])
    if versions_differ:
        key = versions_differ[0]
        level = Level.PROBLEM if key in ("titan_ext", "torchft") else Level.WARNING
        what = "; ".join(
            f"{each} {theirs['versions'].get(each)} at {name}, {ours['versions'].get(each)} here"
            for each in versions_differ
        )
        why = "sites of different versions may not understand each other, or compute different bits"
        found.append(
            Finding("versions", level, what, why, f"pip install {key}=={ours['versions'].get(key)}, at one of them")
        )
    if "titan_ext" in versions_differ:
        return found  # another version may put what it has into other words
    sites = [InCommon.decoded(each["in_common"].encode()) for each in (ours, theirs)]
    if what := differences(sites, ["this site", name]):
        why = "sites with different plans refuse each other at the first round"
        found.append(
            Finding("plan", Level.PROBLEM, what, why, "start all sites from the same file, with the same flags")
        )
    return found


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    return [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]


def _absent(name: str) -> Finding:
    what = f"no doctor of site {name} has come to the lighthouse"
    why = "what lies between the two sites could not be looked at"
    return Finding(
        f"to {name}",
        Level.NOTE,
        what,
        why,
        f"at {name}, at the same time as here: titan-ext doctor FILE.toml --site {name}",
    )


def _unreachable(name: str, what: str, problem: str) -> Finding:
    why = "the two sites cannot exchange anything"
    mend = "open the port between them, or [replica] interface / hostname at that site = what this one reaches"
    return Finding(f"to {name}", Level.PROBLEM, f"{what} of {name} cannot be reached: {problem}", why, mend)


def _wait_for_farewells(probe: Probe, names: set[str], strangers: set[str]) -> None:
    """Until the others need this site's probe no more; those of another secret have to find that out, too."""
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while not names <= probe.done or probe.refused < len(strangers):
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80
