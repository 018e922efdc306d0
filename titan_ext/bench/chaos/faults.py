"""Faults: chosen from a seed before anything starts, injected into running processes, and undone where they last."""

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from titan_ext.launcher.processes import send
from titan_ext.launcher.running import Processes


class Kind(StrEnum):
    """What happens to a site or to the lighthouse."""

    KILL = "SIGKILL"
    """All ranks of a site die at once."""
    STOP = "SIGSTOP"
    """All ranks of a site stand still for a while."""
    TERMINATE = "SIGTERM"
    """A site is asked to end, as a scheduler does it, and started again."""
    LIGHTHOUSE = "lighthouse killed"
    """The lighthouse dies by SIGKILL and is started again on the same port."""
    CUT = "link cut"
    """A site's network is gone for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of the schedule."""

    at: float
    """Seconds after the first commit."""
    kind: Kind
    site: str | None = None
    """None for the lighthouse."""
    seconds: float = 0.0
    """How long it lasts, where it does."""

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g} s" if self.seconds else ""
        return f"{self.kind} {self.site}{lasting}" if self.site else str(self.kind)


def sample_faults(seed: int, *, sites: list[str], kinds: list[Kind], per_hour: float, seconds: float) -> list[Fault]:
    """Faults over a span of time.

    Kinds come in shuffled turns, so that even a short run sees each of them.

    Args:
        seed: equal seeds give equal schedules.
        sites: names to choose from.
        kinds: what may happen.
        per_hour: rate on average.
        seconds: length of the span.
    """
    chance = random.Random(seed)
    faults: list[Fault] = []
    turn: list[Kind] = []
    at = 0.0
    while True:
        at += chance.uniform(0.5, 1.5) * 3600 / per_hour
        if at > seconds:
            return faults
        turn = turn or chance.sample(kinds, len(kinds))
        kind = turn.pop()
        site = None if kind is Kind.LIGHTHOUSE else chance.choice(sites)
        # Shorter and longer than the silence after which a site counts as dead, and than a reduction's patience.
        lasting = round(chance.uniform(2.0, 20.0), 1) if kind in (Kind.STOP, Kind.CUT) else 0.0
        faults.append(Fault(at=round(at, 1), kind=kind, site=site, seconds=lasting))


def inject(fault: Fault, processes: Processes, cut_off: Callable[[str, float], None]) -> Callable[[], None] | None:
    """Make a fault happen to the processes as they are now.

    Args:
        fault: what to do.
        processes: those of the run.
        cut_off: parts a site from all others for some seconds.

    Returns:
        What undoes it; None if no such process runs.
    """
    if fault.kind is Kind.CUT:
        cut_off(fault.site, fault.seconds)
        return lambda: None
    number, pids = _signal(fault, processes)
    for pid in pids:
        send(pid, number)
    return (lambda: _resume(fault, pids)) if pids else None


def _resume(fault: Fault, pids: list[int]) -> None:
    if fault.kind is Kind.STOP:
        for pid in pids:
            send(pid, signal.SIGCONT)


def _signal(fault: Fault, processes: Processes) -> tuple[int, list[int]]:
    """The signal and whom it is sent to."""
    match fault.kind:
        case Kind.LIGHTHOUSE:
            return signal.SIGKILL, processes.lighthouse
        case Kind.TERMINATE:
            return signal.SIGTERM, processes.guards[fault.site]
        case Kind.KILL:
            return signal.SIGKILL, processes.ranks[fault.site]
        case _:
            return signal.SIGSTOP, processes.ranks[fault.site]
