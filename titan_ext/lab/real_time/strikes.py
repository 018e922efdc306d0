"""Faults of a rehearsal in real time: what is done to the sites' processes and to what lies between them."""

import signal
import threading
import time
from collections.abc import Callable, Sequence

from titan_ext.lab.faults import Fault
from titan_ext.launcher.processes import kill_descendants, send
from titan_ext.launcher.running import running

_PERIOD_SECONDS = 0.2
"""In which a slow site is stopped and goes on: shorter than the time between two heartbeats."""


class Strikes:
    """Brings faults about, each at its time after ``begin``, on threads of its own.

    Args:
        faults: in the order of their times.
        sites: their names.
        partition: cuts two sites, by their places, off from each other for some seconds.
    """

    def __init__(
        self, faults: Sequence[Fault], sites: Sequence[str], partition: Callable[[Sequence[int], float], None]
    ) -> None:
        self._faults, self._sites, self._partition = faults, sites, partition
        self._back_at: dict[str, float] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Time counts from now on."""
        began = time.monotonic()
        self._start(lambda: self._run(began))

    def end(self) -> None:
        """No more of it; what is stopped goes on."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def restart_seconds(self, site: str) -> float | None:
        """How long a site that has been killed stays away; None for one that has ended by itself."""
        back_at = self._back_at.pop(site, None)
        return None if back_at is None else max(0.0, back_at - time.monotonic())

    def _run(self, began: float) -> None:
        for fault in self._faults:
            if self._over.wait(max(0.0, began + fault.at - time.monotonic())):
                return
            name = self._sites[fault.sites[0]]
            if fault.kind == "partition":
                self._partition(fault.sites, fault.seconds)
            elif fault.kind == "slow":
                self._start(lambda name=name, fault=fault: self._slow(name, fault))  # type: ignore[misc]
            else:
                self._kill(name, fault.seconds)

    def _kill(self, site: str, seconds: float) -> None:
        guards = running().guards[site]
        if guards:
            self._back_at[site] = time.monotonic() + seconds
        for guard in guards:  # which lives to tell the launcher
            kill_descendants(guard)

    def _slow(self, site: str, fault: Fault) -> None:
        until, share = time.monotonic() + fault.seconds, max(0.0, 1 - 1 / fault.factor)
        while time.monotonic() < until and not self._over.is_set():
            ranks = running().ranks[site]
            _send_all(ranks, signal.SIGSTOP)
            time.sleep(_PERIOD_SECONDS * share)
            _send_all(ranks, signal.SIGCONT)
            time.sleep(_PERIOD_SECONDS * (1 - share))

    def _start(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action, daemon=True, name="titan_ext-fault")
        self._threads.append(thread)
        thread.start()


def _send_all(processes: Sequence[int], number: int) -> None:
    for process in processes:
        send(process, number)
