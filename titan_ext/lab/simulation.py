"""A discrete-event simulation whose processes are threads: virtual time, and one thread at a time.

What happens depends on nothing but the order of the events: those of one moment come in the order in which they were
made. A process runs until it waits or ends; then the next event is taken, and the clock goes on to it.
"""

import heapq
import threading
from collections.abc import Callable
from itertools import count
from typing import Any


class Ended(BaseException):
    """Unwinds the thread of a process that is ended from outside."""


class Simulation:
    """The clock, the events to come and the processes."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self._events: list[tuple[float, int, bool, Callable[[], None]]] = []
        self._order = count()
        self._to_come = 0
        """Events that something comes of."""
        self._current: Process | None = None
        self._processes: list[Process] = []
        self._handed_back = threading.Semaphore(0)

    def at(self, time: float, action: Callable[[], None], *, recurs: bool = False) -> None:
        """Call ``action`` at a time, now if that has gone by; what ``recurs`` keeps nothing going by itself."""
        self._to_come += not recurs
        heapq.heappush(self._events, (max(time, self.now), next(self._order), recurs, action))

    def after(self, seconds: float, action: Callable[[], None], *, recurs: bool = False) -> None:
        """Call ``action`` in so many seconds; see ``at``."""
        self.at(self.now + seconds, action, recurs=recurs)

    def spawn(self, action: Callable[[], Any]) -> "Process":
        """Start a process; it first runs when those before it wait."""
        process = Process(self, action)
        self._processes.append(process)
        self.at(self.now, process.resume)
        return process

    def run(self, until: float = float("inf")) -> None:
        """Take events until none is left but such as recur, or the next one is after ``until``.

        Raises:
            Exception: what a process raised that nobody waited for.
        """
        while self._to_come and self._events[0][0] <= until:
            self.now, _, recurs, action = heapq.heappop(self._events)
            self._to_come -= not recurs
            action()
            for process in self._processes:
                if process.failure is not None and not process.is_awaited:
                    raise process.failure
            self._processes = [process for process in self._processes if not process.is_over]
        if self._to_come:
            self.now = until

    def close(self) -> None:
        """End all processes."""
        for process in list(self._processes):
            process.end()

    # -- called by processes -------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None:
        """Let the calling process wait for so long."""
        process = self._running()
        self.after(seconds, process.resume_from(process.waits))
        process.hand_back()

    def wait(self, signal: "Signal") -> None:
        """Let the calling process wait for a signal."""
        if not signal.is_set:
            process = self._running()
            signal.call(process.resume_from(process.waits))
            process.hand_back()

    def _running(self) -> "Process":
        assert self._current is not None, "only processes wait"
        return self._current

    def hand_over(self, process: "Process") -> None:
        """Let a process run until it hands back."""
        before, self._current = self._current, process
        process.awake.release()
        self._handed_back.acquire()
        self._current = before

    def handed_back(self) -> None:
        """The process that ran waits, or is over."""
        self._handed_back.release()


class Signal:
    """Something that happens once.

    Args:
        simulation: in which it happens.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.is_set = False
        self._simulation = simulation
        self._waiting: list[Callable[[], None]] = []

    def set(self) -> None:
        """It happens; what waits for it goes on."""
        if not self.is_set:
            self.is_set = True
            for action in self._waiting:
                self._simulation.at(self._simulation.now, action)

    def call(self, action: Callable[[], None]) -> None:
        """Call ``action`` when it happens, or now."""
        if self.is_set:
            self._simulation.at(self._simulation.now, action)
        else:
            self._waiting.append(action)


class Process:
    """A thread that runs while all others wait. Made by ``Simulation.spawn``."""

    def __init__(self, simulation: Simulation, action: Callable[[], Any]) -> None:
        self.awake = threading.Semaphore(0)
        self.done = Signal(simulation)
        self.failure: BaseException | None = None
        self.is_awaited = False
        self.is_over = False
        self.waits = 0
        """How often it has waited: what comes for an earlier wait is too late."""
        self._result: Any = None
        self._ending = False
        self._simulation = simulation
        self._action = action
        self._thread: threading.Thread | None = None

    def resume(self) -> None:
        """Let it run on."""
        if self.is_over:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._simulation.hand_over(self)

    def resume_from(self, wait: int) -> Callable[[], None]:
        """What lets it run on, if it is still in that wait."""

        def resume() -> None:
            if self.waits == wait:
                self.waits += 1
                self.resume()

        return resume

    def hand_back(self) -> None:
        """Wait; called by the process itself."""
        if self._ending:
            raise Ended  # once more, from what cleans up
        self._simulation.handed_back()
        self.awake.acquire()
        if self._ending:
            raise Ended

    def end(self) -> None:
        """End it from outside; what it waits in raises ``Ended``."""
        self._ending = True
        self.waits += 1
        if self._thread is None:
            self.is_over = True
            self.done.set()
        else:
            self.resume()

    def result(self) -> Any:
        """Wait for its end, as a process; what it returned. Raises what it raised."""
        self.is_awaited = True
        self._simulation.wait(self.done)
        if self.failure is not None:
            raise self.failure
        return self._result

    def _run(self) -> None:
        self.awake.acquire()
        try:
            if not self._ending:
                self._result = self._action()
        except Ended:
            pass
        except BaseException as failure:  # noqa: BLE001 — handed to whoever waits
            self.failure = failure
        self.is_over = True
        self.done.set()
        self._simulation.handed_back()
