"""Runs all sites and the lighthouse under the launcher's supervisor, and injects faults by a schedule."""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titan_ext.bench.chaos.faults import Fault, Kind, inject
from titan_ext.bench.chaos.history import Sample, SiteHistory
from titan_ext.bench.chaos.run_config import GRACE_SECONDS
from titan_ext.launcher.processes import adopt_orphans, descendants, send
from titan_ext.launcher.running import Processes, held, running
from titan_ext.launcher.supervisor import Event, Job, Phase, StopRequests, Supervisor

_POLL_SECONDS = 0.2
_STALLED_SECONDS = 240.0  # without a commit: longer than any patience in the configuration
_WITHOUT_LIMIT = 10**6
_CALM_ROUNDS = 10
# To start a site again; a connection that stood still comes back only after about as long again, by TCP's patience.
_RECOVERY_SECONDS = 30.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """A run that is over."""

    sites: dict[str, SiteHistory]
    injected: list[Fault] = field(default_factory=list)
    code: int = 0
    """Of the supervisor: 0 if every site came to its last step and ended well."""
    most_ranks: int = 0
    """Training processes that one site had at a time."""
    left: list[int] = field(default_factory=list)
    """Processes that were there after the end."""
    seconds: float = 0.0


class ChaosRun:
    """One run under faults.

    Args:
        folders: name of the site -> its dump folder.
        jobs: the lighthouse and the sites.
        faults: the schedule.
        cut_off: parts a site from all others for some seconds.
        keep_live: a fault waits while it would leave fewer than that of the sites whose work is in the last commit.
        rounds: length of the run; no fault happens any more once sites could not come back before its end.
        seconds: limit of the run.
        say: takes a line for the user.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        jobs: Sequence[Job],
        faults: Sequence[Fault],
        *,
        cut_off: Callable[[str, float], None],
        keep_live: int,
        rounds: int,
        seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._outcome = Outcome(sites={name: SiteHistory(folder) for name, folder in folders.items()})
        self._jobs = jobs
        self._waiting = list(faults)
        self._cut_off = cut_off
        self._keep_live = keep_live
        self._rounds = rounds
        self._say = say
        self._lasting: list[tuple[float, Fault, Callable[[], None]]] = []
        self._deadline = time.monotonic() + seconds
        self._began = self._last_commit = time.monotonic()
        self._first_commit: float | None = None
        self._round = 0
        self._contributors: list[str] = []

    def run(self) -> Outcome:
        """Until all sites have ended, or the limit is reached."""
        outcome = self._outcome
        adopt_orphans()
        before = {*descendants(os.getpid())}
        with StopRequests() as stops:
            supervisor = Supervisor(
                self._jobs,
                max_restarts=_WITHOUT_LIMIT,
                grace_seconds=GRACE_SECONDS,
                poll_seconds=_POLL_SECONDS,
                stop_requests=lambda: stops.count or int(self._is_late()),
                on_event=self._on_event,
                on_tick=self._tick,
            )
            try:
                outcome.code = supervisor.run()
            finally:
                self._undo(lambda due: True)
            if stops.count:
                raise KeyboardInterrupt
        self._read()
        outcome.seconds = time.monotonic() - self._began
        outcome.left = sorted({*descendants(os.getpid())} - before)
        for pid in outcome.left:
            send(pid, signal.SIGKILL)
        return outcome

    def _is_late(self) -> bool:
        now = time.monotonic()
        return now > self._deadline or now > self._last_commit + _STALLED_SECONDS

    def _on_event(self, event: Event) -> None:
        site = self._outcome.sites.get(event.job.name)
        if event.phase is Phase.WAITING:
            self._note(f"{event.job.name} ended with exit code {event.code}, starts again in {event.delay:g} s")
        if site is None:
            return
        if event.phase is Phase.RUNNING:
            site.recover()
        elif event.phase in (Phase.WAITING, Phase.FAILED) and site.is_live:
            site.deaths.append(time.time())
            self._note(f"{event.job.name}: no fault explains that")

    def _tick(self) -> None:
        processes = running()
        self._read(processes)
        ranks = max((len(pids) for pids in processes.ranks.values()), default=0)
        self._outcome.most_ranks = max(self._outcome.most_ranks, ranks)
        self._undo(lambda due: due <= time.monotonic())
        if self._first_commit is not None:
            self._inject(processes)

    def _read(self, processes: Processes | None = None) -> None:
        for name, site in self._outcome.sites.items():
            if not site.poll():
                continue
            self._last_commit = time.monotonic()
            self._first_commit = self._first_commit or self._last_commit
            last = site.commits[-1]
            if last["round"] // 10 > self._round // 10:
                self._note(f"round {last['round']}: {len(last['contributors'])} site(s)")
            self._round, self._contributors = max(self._round, last["round"]), last["contributors"]
            for pid in processes.ranks[name] if processes is not None else []:
                if (found := held(pid)) is not None:
                    site.samples.append(Sample(time.time(), pid, last["round"], *found))

    def _inject(self, processes: Processes) -> None:
        now = time.monotonic()
        for fault in [each for each in self._waiting if self._first_commit + each.at <= now]:
            site = self._outcome.sites.get(fault.site)
            if not self._leaves_time(fault):
                continue
            if site is not None and not self._may_inject(fault.site):
                continue  # its turn comes when enough sites are back
            undo = inject(fault, processes, self._cut_off)
            if undo is None:
                continue
            self._waiting.remove(fault)
            self._outcome.injected.append(fault)
            self._note(str(fault))
            if site is not None:
                site.interrupt()
            if fault.kind in (Kind.STOP, Kind.CUT):
                self._lasting.append((now + fault.seconds, fault, undo))

    def _leaves_time(self, fault: Fault) -> bool:
        """Whether whom it hits will be back before the others are through, as far as their pace tells."""
        left = self._rounds - self._round
        seconds = left * (time.monotonic() - self._first_commit) / max(1, self._round - 1)
        return left >= _CALM_ROUNDS and seconds >= _RECOVERY_SECONDS + 2 * fault.seconds

    def _may_inject(self, name: str) -> bool:
        sites = self._outcome.sites
        others = [each for each in self._contributors if each != name and sites[each].is_live]
        return sites[name].is_live and len(others) >= self._keep_live

    def _undo(self, is_due: Callable[[float], bool]) -> None:
        for entry in [each for each in self._lasting if is_due(each[0])]:
            due, fault, undo = entry
            self._lasting.remove(entry)
            undo()
            self._outcome.sites[fault.site].recover()
            self._note(f"{fault}: over")

    def _note(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began:8.1f} s  {text}")
