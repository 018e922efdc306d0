"""A rehearsal in real time: the run's own processes under its own launcher, with links and faults between the sites."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from titan_ext.config import check_outputs, load_to_start
from titan_ext.lab.faults import Fault
from titan_ext.lab.real_time.derived import derive
from titan_ext.lab.real_time.outcome import read_outcome
from titan_ext.lab.real_time.strikes import Strikes
from titan_ext.lab.trace import Outcome
from titan_ext.launcher.jobs import NodeOfSite, site_jobs
from titan_ext.launcher.lighthouses import lighthouses, waiting_for_all
from titan_ext.launcher.run import LaunchedSite, run_jobs
from titan_ext.launcher.supervisor import Job
from titan_ext.semi_sync.wire.link import number_of_streams

_GRACE_SECONDS = 20.0
_FAILURES = 3
"""Restarts that a site has beside those after faults, as in a launch."""


class Surroundings(Protocol):
    """What lies between the sites of a rehearsal."""

    addresses: list[str]
    """Of the sites."""
    lighthouse: str
    """Address of the lighthouse."""
    streams: int | None
    """Connections for each pair of ranks where a site leaves them to the distance; None: it can measure that."""

    def inside(self, place: int, command: Sequence[str]) -> list[str]:
        """The command line that runs a site's command where the site is."""

    def lighthouse_command(self, command: Sequence[str]) -> list[str]:
        """The command line that runs the lighthouse's."""

    def partition(self, pair: Sequence[int], seconds: float) -> None:
        """Nothing passes between two sites for so long."""

    def cut_off(self, place: int, seconds: float) -> None:
        """Nothing passes between a site and the others, or the lighthouse, for so long."""

    def bytes_sent(self) -> list[int]:
        """By site, so far."""

    def close(self) -> None:
        """Take it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealScript:
    """What a rehearsal in real time is of."""

    file: str
    sites: Sequence[Any]
    """``Site`` of the file, or copies of its first one."""
    copies: int | None
    overrides: Sequence[str]
    faults: Sequence[Fault]
    until: float
    """Seconds, from the first inner steps on, after which the sites are told to leave."""
    out: str | None
    """Folder for what the sites leave; None: it is removed."""


def rehearse(script: RealScript, surroundings: Surroundings) -> tuple[int, Outcome]:
    """Run it to its end.

    Args:
        script: what it is of.
        surroundings: what lies between the sites.

    Returns:
        The launcher's exit code (0 also where ``until`` was reached), and what came of it.

    Raises:
        UserError: the sites cannot be started on this machine, or there is a run in the folder already.
    """
    with ExitStack() as stack:
        stack.enter_context(closing(surroundings))
        folder = Path(script.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="titan_ext-lab-")))
        file = derive(
            script.file,
            folder.absolute(),
            copies=script.copies,
            addresses=surroundings.addresses,
            ranks=[site.nproc for site in script.sites],
            streams=surroundings.streams if _by_distance(script.sites) else None,
        )
        sites = load_to_start(file, None, script.overrides)
        for site in sites:
            check_outputs(site.config)
        names = [site.name for site in sites]
        strikes = Strikes(script.faults, names, surroundings.partition)
        clock = _Clock([Path(site.config.dump_folder) for site in sites], strikes.begin, script.until)
        try:
            code = run_jobs(
                jobs_between(sites, surroundings, file, script.overrides, _GRACE_SECONDS),
                [LaunchedSite(site.name, Path(site.config.dump_folder), site.config.training.steps) for site in sites],
                max_restarts=_FAILURES + sum(fault.kind == "kill" for fault in script.faults),
                plain=False,
                complete=True,
                grace_seconds=_GRACE_SECONDS,
                restart_seconds=strikes.restart_seconds,
                on_tick=clock.tick,
            )
        except _TimeIsUp:
            code = 0
        finally:
            strikes.end()
        return code, read_outcome(folder, names, clock.began, surroundings.bytes_sent(), script.until)


def _by_distance(sites: Sequence[Any]) -> bool:
    return not any(number_of_streams(site.config.semi_sync.streams) for site in sites)


def jobs_between(
    sites: Sequence[Any],
    surroundings: Surroundings,
    file: str,
    overrides: Sequence[str],
    grace_seconds: float,
) -> list[Job]:
    """The lighthouses and each site, where they are.

    Args:
        sites: each a ``Site`` of the file.
        surroundings: what lies between them.
        file: that ``derive`` has written.
        overrides: flags for its settings.
        grace_seconds: how long a site that is told to leave may take.
    """
    found, expected = lighthouses(sites, surroundings.lighthouse), waiting_for_all(sites)
    jobs = site_jobs(
        [NodeOfSite(site) for site in sites],
        lambda name: ("--config", file, "--site", name, *expected, *found.flags.get(name, ()), *overrides),
        grace_seconds=grace_seconds,
        patience_seconds=grace_seconds,
        environment=found.environment,
    )
    return [
        *(replace(job, command=surroundings.lighthouse_command(job.command)) for job in found.services),
        *(replace(job, command=surroundings.inside(place, job.command)) for place, job in enumerate(jobs)),
    ]


class _TimeIsUp(Exception):
    """Ends the run in order."""


class _Clock:
    """Counts from when every site has taken inner steps.

    Args:
        folders: of the sites.
        begin: called then.
        until: seconds after which ``tick`` raises.
    """

    def __init__(self, folders: Sequence[Path], begin: Callable[[], None], until: float) -> None:
        self.began = time.time()
        self._files, self._begin, self._until = [folder / "metrics.jsonl" for folder in folders], begin, until
        self._runs = False

    def tick(self) -> None:
        """Look at the time."""
        if not self._runs and all(_has_steps(file) for file in self._files):
            self._runs, self.began = True, time.time()
            self._begin()
        if self._runs and time.time() - self.began > self._until:
            raise _TimeIsUp


def _has_steps(file: Path) -> bool:
    return file.is_file() and os.path.getsize(file) > 0 and b'"kind": "step"' in file.read_bytes()
