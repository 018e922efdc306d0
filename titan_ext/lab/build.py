"""From a file and the flags of ``titan-ext lab`` to a script."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from titan_ext.errors import UserError
from titan_ext.lab.faults import Fault, load_faults, parse_faults, random_kills
from titan_ext.lab.real_time.run import RealScript
from titan_ext.lab.rehearsal import Script
from titan_ext.lab.stand_in import shrinking
from titan_ext.links.link import Links, parse_links, parse_seconds
from titan_ext.planner.build import site_wiring, step_times

_WHEN_UNKNOWN = 86400.0
"""Seconds for which random faults are drawn where the rehearsal has no end of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user wants rehearsed."""

    sites: int | None = None
    """That many copies of the file's first site; None: the file's sites."""
    links: Sequence[str] = ()
    steps: Sequence[str] = ()
    """``--step`` flags."""
    flops: str | None = None
    faults: Sequence[str] = ()
    """``--fault`` flags."""
    fault_log: str | None = None
    mtbf: str | None = None
    restart: str = "30s"
    until: str | None = None
    seed: int = 0
    jitter: float = 0.02
    out: str | None = None
    """Folder for what the sites leave."""


def make_script(sites: Sequence[Any], request: Request) -> Script:
    """The script of a rehearsal.

    Raises:
        UserError: naming the flag, its value and what is allowed.
    """
    sites = _copies(sites, request.sites)
    names = [site.name for site in sites]
    _check(sites, request)
    until = _until(request)
    steps = step_times(sites, request.steps, request.flops)
    shrunk, wiring = shrinking(sites[0]), site_wiring(sites, parse_links(request.links, names))
    return Script(
        sites=[_alone(site, shrunk.bucket_mib) for site in sites],
        links=wiring.links,
        step_seconds=[steps[name].likely for name in names],
        shrinking=shrunk.factor,
        transport=wiring.transport,
        connections=wiring.connections,
        faults=_faults(names, request, min(until, _WHEN_UNKNOWN), min(each.likely for each in steps.values())),
        seed=request.seed,
        step_jitter=request.jitter,
        until=until,
    )


def make_real_script(
    file: str, overrides: Sequence[str], sites: Sequence[Any], request: Request
) -> tuple[RealScript, Links]:
    """The script of a rehearsal in real time, and the links between its sites.

    Args:
        file: the run's.
        overrides: flags for its settings.
        sites: of the file.
        request: what the user wants.

    Raises:
        UserError: naming the flag, its value and what is allowed.
    """
    sites = _copies(sites, request.sites)
    names = [site.name for site in sites]
    _check(sites, request)
    for flag, given in (("--step", request.steps), ("--flops", request.flops)):
        if given:
            raise UserError(
                f"{flag}: inner steps take as long as they take on this machine; add --virtual-time to say how long"
            )
    until = _until(request)
    faults = _faults(names, request, min(until, _WHEN_UNKNOWN))
    for fault in faults:
        if fault.kind == "slow" and fault.factor < 1:
            raise UserError(
                f"slow:{names[fault.sites[0]]}…*{fault.factor:g}: no site is faster in real time; add --virtual-time"
            )
    script = RealScript(
        file=file,
        sites=sites,
        copies=request.sites,
        overrides=overrides,
        faults=faults,
        until=until,
        out=request.out,
    )
    return script, parse_links(request.links, names)


def _until(request: Request) -> float:
    if request.until is None:
        return float("inf")
    until = parse_seconds(request.until, f"--until {request.until}")
    if until <= 0:
        raise UserError(f"--until {request.until}: must be above 0")
    return until


def _copies(sites: Sequence[Any], count: int | None) -> list[Any]:
    if count is None:
        return list(sites)
    if count < 1:
        raise UserError(f"--sites {count}: must be at least 1")
    return [replace(sites[0], name=f"site{place}", index=place, count=count) for place in range(count)]


def _alone(site: Any, bucket_mib: float) -> Any:
    """The site with one rank, which stands for all of them."""
    config = copy.copy(site.config)
    config.semi_sync = replace(config.semi_sync, pairing="rank", outer_state_device="same", bucket_mib=bucket_mib)
    return replace(site, config=config)


def _check(sites: Sequence[Any], request: Request) -> None:
    if sites[0].config.semi_sync.method == "none":
        raise UserError('semi_sync.method = "none": there is nothing between the sites to rehearse')
    if (least := sites[0].config.replica.min_sites) > len(sites):
        raise UserError(
            f"--sites {len(sites)}: with replica.min_sites = {least} nothing would ever be exchanged; add "
            f"--replica.min_sites={len(sites)}"
        )
    if len(sites) > 1 and not request.links:
        raise UserError("--link: none given; add --link 200mbit,40ms, or one for each pair: --link A-B=…")
    if not 0 <= request.jitter < 0.3:
        raise UserError(f"--jitter {request.jitter:g}: must be at least 0 and below 0.3")


def _faults(names: Sequence[str], request: Request, until: float, step: float = 0.0) -> list[Fault]:
    restart = parse_seconds(request.restart, f"--restart {request.restart}")
    found = parse_faults(request.faults, names, restart)
    if request.fault_log is not None:
        found += load_faults(request.fault_log, names, restart)
    if request.mtbf is not None:
        mean = parse_seconds(request.mtbf, f"--mtbf {request.mtbf}")
        if mean <= 0:
            raise UserError(f"--mtbf {request.mtbf}: must be above 0")
        if request.until is None and mean < step:
            raise UserError(
                f"--mtbf {request.mtbf}: must be at least an inner step's {step:.3g} s, or nothing is ever trained; give "
                "--until to see what happens then"
            )
        found += random_kills(mean, names, until, restart, request.seed)
    return sorted(found, key=lambda fault: fault.at)
