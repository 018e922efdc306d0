"""Doing faults to running sites, and undoing those that last."""

import signal
import subprocess
from collections.abc import Callable, Mapping

from titan_ext.bench.chaos.processes import Processes
from titan_ext.bench.chaos.schedule import Fault, Kind
from titan_ext.launcher.processes import send

_LINK = "wan0"  # of a site's namespace


def strike(fault: Fault, processes: Processes, networks: Mapping[str, int]) -> Callable[[], None] | None:
    """Do it to the processes as they are now.

    Args:
        fault: what to do.
        processes: those of the run.
        networks: name of the site -> a process in its network namespace; for link cuts.

    Returns:
        What undoes it; None if there is nobody to strike.
    """
    if fault.kind is Kind.CUT:
        _switch_link(networks[fault.site], "down")
        return lambda: _switch_link(networks[fault.site], "up")
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


def _switch_link(network: int, state: str) -> None:
    subprocess.run(["nsenter", f"--net=/proc/{network}/ns/net", "ip", "link", "set", _LINK, state], check=True)
