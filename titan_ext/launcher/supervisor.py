"""Keeps the processes of a run going: starts them, restarts those that die, and ends them all."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from titan_ext.errors import UserError
from titan_ext.launcher.guard import guarded
from titan_ext.launcher.log import ProcessLog
from titan_ext.launcher.processes import kill_descendants, send

INTERRUPTED = 130
_MAX_BACKOFF_SECONDS = 30.0
_GUARD_MARGIN_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Something to keep running."""

    name: str
    command: Sequence[str]
    log: Path
    """Where its output goes; appended to."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables on top of the launcher's own."""
    is_service: bool = False
    """Runs as long as the others: its end is a failure whatever the exit code, and nobody waits for it."""


class Phase(StrEnum):
    """Where a job stands."""

    RUNNING = "running"
    WAITING = "waiting"
    """Died, and will be started again."""
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Event:
    """A job changed its phase."""

    job: Job
    phase: Phase
    log: ProcessLog
    code: int | None = None
    """Exit code of what ended; 128 plus the signal's number where a signal ended it."""
    restarts: int = 0
    """Restarts so far, the coming one included."""
    delay: float = 0.0
    """Seconds until the restart."""


class Supervisor:
    """Runs jobs until all have finished, one has failed for good, or it is told to stop.

    Args:
        jobs: services first: they are started in this order, and ended after the others.
        max_restarts: how often a job that dies is started again. Bad input (exit code 2) never is.
        backoff_seconds: wait before the first restart; doubles with each.
        restart_seconds: how long a job of a name is to wait in place of that; None leaves it at that.
        grace_seconds: seconds from SIGTERM to SIGKILL: what a site may take to save and leave.
        stop_requests: how often the user asked to stop: once ends all in order, twice kills.
        on_event: called at each change of phase.
        on_tick: called some times a second.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        max_restarts: int = 3,
        backoff_seconds: float = 1.0,
        grace_seconds: float = 60.0,
        poll_seconds: float = 0.1,
        stop_requests: Callable[[], int] = lambda: 0,
        on_event: Callable[[Event], None] = lambda event: None,
        on_tick: Callable[[], None] = lambda: None,
        restart_seconds: Callable[[str], float | None] = lambda name: None,
    ) -> None:
        self._max_restarts = max_restarts
        self._backoff_seconds = backoff_seconds
        self._grace_seconds = grace_seconds
        self._poll_seconds = poll_seconds
        self._stop_requests = stop_requests
        self._on_event = on_event
        self._on_tick = on_tick
        self._restart_seconds = restart_seconds
        self._runners = [_Runner(job, ProcessLog(job.log)) for job in jobs]

    def run(self) -> int:
        """Returns 0 when all have finished, 130 when told to stop, else the exit code of the failure: 2 or 1.

        No process is left when it returns or raises.
        """
        try:
            for runner in self._runners:
                self._start(runner)
            while any(not runner.is_settled for runner in self._runners):
                if self._stop_requests():
                    return INTERRUPTED
                for runner in self._runners:
                    self._advance(runner)
                failed = [runner.code for runner in self._runners if runner.phase is Phase.FAILED]
                if failed:
                    return UserError.exit_code if UserError.exit_code in failed else 1
                self._on_tick()
                time.sleep(self._poll_seconds)
            return 0
        finally:
            self._end_all()

    def _start(self, runner: "_Runner") -> None:
        runner.start(self._grace_seconds)
        self._set_phase(runner, Phase.RUNNING)

    def _advance(self, runner: "_Runner") -> None:
        if runner.phase is Phase.WAITING and time.monotonic() >= runner.due:
            self._start(runner)
        if runner.phase is not Phase.RUNNING or (code := runner.process.poll()) is None:
            return
        runner.code = code
        if code == 0 and not runner.job.is_service:
            self._set_phase(runner, Phase.FINISHED)
        elif code == UserError.exit_code or runner.restarts >= self._max_restarts:
            self._set_phase(runner, Phase.FAILED)
        else:
            delay = self._restart_seconds(runner.job.name)
            if delay is None:
                delay = min(self._backoff_seconds * 2**runner.restarts, _MAX_BACKOFF_SECONDS)
            runner.restarts += 1
            runner.due = time.monotonic() + delay
            self._set_phase(runner, Phase.WAITING, delay)

    def _set_phase(self, runner: "_Runner", phase: Phase, delay: float = 0.0) -> None:
        runner.phase = phase
        self._on_event(Event(runner.job, phase, runner.log, runner.code, runner.restarts, delay))

    def _end_all(self) -> None:
        # Services last: a site that saves and leaves may still send them requests.
        for services in (False, True):
            self._end([runner for runner in self._runners if runner.job.is_service is services])
        for runner in self._runners:
            runner.log.close()

    def _end(self, runners: Sequence["_Runner"]) -> None:
        running = [runner for runner in runners if runner.process is not None and runner.process.poll() is None]
        for runner in running:
            send(runner.process.pid, signal.SIGTERM)
        # The guard itself sends SIGKILL after the grace; the margin is for a guard that hangs.
        deadline = time.monotonic() + self._grace_seconds + _GUARD_MARGIN_SECONDS
        while any(runner.process.poll() is None for runner in running):
            if self._stop_requests() > 1 or time.monotonic() > deadline:
                break
            time.sleep(self._poll_seconds)
        for runner in running:
            if runner.process.poll() is None:
                runner.kill()
        for runner in runners:
            if runner.phase in (Phase.RUNNING, Phase.WAITING):
                self._set_phase(runner, Phase.STOPPED)


@dataclass(slots=True)
class _Runner:
    """A job, its process of the moment and its history."""

    job: Job
    log: ProcessLog
    process: subprocess.Popen | None = None
    phase: Phase = Phase.WAITING
    code: int | None = None
    restarts: int = 0
    due: float = 0.0

    @property
    def is_settled(self) -> bool:
        return self.job.is_service or self.phase in (Phase.FINISHED, Phase.FAILED)

    def start(self, grace_seconds: float) -> None:
        self.log.begin(f"{self.job.name}, attempt {self.restarts + 1}")
        # A session of its own: Ctrl-C in the terminal goes to the launcher alone, which ends the sites in order.
        self.process = subprocess.Popen(
            guarded(self.job.command, grace_seconds),
            stdin=subprocess.DEVNULL,
            stdout=self.log.fileno(),
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.job.environment},
            start_new_session=True,
        )

    def kill(self) -> None:
        kill_descendants(self.process.pid)
        self.process.kill()
        self.process.wait()


class StopRequests:
    """Counts SIGINT, SIGTERM and SIGHUP while entered; the main thread only."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count = 0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        self._previous_handlers = {number: signal.signal(number, self._count) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
