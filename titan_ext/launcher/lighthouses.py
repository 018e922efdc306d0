"""The lighthouses of a run whose sites are all on this machine: that of the run, and one for each region that has its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_ext.commands import lighthouse
from titan_ext.launcher.placement import free_port
from titan_ext.launcher.supervisor import Job


@dataclass(frozen=True, slots=True)
class Lighthouses:
    """What to start, and what tells the sites of it."""

    services: list[Job] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """Of all sites."""
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By site."""
    lines: list[str] = field(default_factory=list)
    """For the user."""


def lighthouses(sites: Sequence[Any], host: str = "127.0.0.1", port: int | None = None) -> Lighthouses:
    """As patient as the sites want them.

    Args:
        sites: each a ``Site``.
        host: address of this machine on which they listen.
        port: of the run's; None: a free one.
    """
    url = f"http://{host}:{port or free_port()}"
    found = Lighthouses([_job(sites, url)], {"TORCHFT_LIGHTHOUSE": url}, {}, [f"lighthouse at {url}"])
    for region, members in _regions_without_lighthouse(sites).items():
        url = f"http://{host}:{free_port()}"
        found.services.append(_job(members, url, region))
        found.lines.append(f"lighthouse of region {region} at {url}")
        found.flags.update({site.name: ("--replica.region_lighthouse", url) for site in members})
    return found


def waiting_for_all(sites: Sequence[Any]) -> tuple[str, ...]:
    """The flag that has the sites of this machine wait for each other at the start, unless the file says for how many."""
    waits = len(sites) > 1 and all(site.config.replica.expected_sites == 0 for site in sites)
    return ("--replica.expected_sites", str(len(sites))) if waits else ()


def _regions_without_lighthouse(sites: Sequence[Any]) -> dict[str, list[Any]]:
    """By path the sites of each region that average by themselves, if all sites of the run are here and none names one."""
    from titan_ext.semi_sync.plan.regions import REGION  # with torch, which listing commands need not load

    configs = [site.config for site in sites]
    if len(sites) < sites[0].count or any(
        each.semi_sync.region_sync_every is None or each.replica.region_lighthouse is not None for each in configs
    ):
        return {}
    found: dict[str, list[Any]] = {}
    for site in sites:
        found.setdefault(site.config.site.labels[REGION], []).append(site)
    return found


def _job(sites: Sequence[Any], url: str, region: str = "") -> Job:
    """Where sites meet: those of the run, or those of a region for its own averages."""
    settings = [site.config.replica for site in sites]
    of_region = f"_{region.replace('/', '_')}" if region else ""
    return Job(
        name=f"lighthouse of region {region}" if region else "lighthouse",
        command=lighthouse.command(
            address=url.removeprefix("http://"),
            min_sites=1 if region else max(each.min_sites for each in settings),
            join_timeout_seconds=max(each.join_timeout_seconds for each in settings),
            heartbeat_timeout_seconds=max(each.heartbeat_timeout_seconds for each in settings),
        ),
        log=Path(sites[0].dump_root) / f"lighthouse{of_region}.log",
        is_service=True,
    )
