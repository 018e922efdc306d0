"""Shows what the sites of a run write and how their processes end."""

import json
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from titan_ext.files import append_line, is_full
from titan_ext.launcher.display import Display
from titan_ext.launcher.log import ERROR_PREFIX
from titan_ext.launcher.results import JsonLinesFollower
from titan_ext.launcher.supervisor import Event, Phase, StopRequests

# A rank that met with what it did not expect, and left its traceback in the log.
_CRASH = re.compile(rf"{ERROR_PREFIX} rank (\d+): ")


class RunMonitor:
    """Passes the sites' metrics and the changes of their jobs' phases on to a display.

    Args:
        display: where to show them.
        followers: name of the site -> its ``metrics.jsonl``.
        events: name of the site -> file to which its changes of phase are appended, for `titan-ext watch`.
        max_restarts: to say how many are left.
        stops: what the user asked for.
    """

    def __init__(
        self,
        display: Display,
        followers: Mapping[str, JsonLinesFollower],
        *,
        events: Mapping[str, Path],
        max_restarts: int,
        stops: StopRequests,
    ) -> None:
        self._display = display
        self._followers = followers
        self._events = events
        self._max_restarts = max_restarts
        self._stops = stops
        self._stop_is_acknowledged = False
        self._without_room: set[str] = set()
        self.failures: list[str] = []
        """What to print at the end about processes that failed for good."""

    def on_event(self, event: Event) -> None:
        """A job changed its phase."""
        # Before the phase: what the job wrote before it ended must be shown before its end.
        self.show_metrics()
        name, log = event.job.name, event.log.path
        text = ""
        if event.phase is Phase.WAITING:
            reason = event.log.error_line() or _exit_reason(event)
            text = f"{reason}; restart {event.restarts} of {self._max_restarts}"
            self._display.note(f"{name}: {text} in {event.delay:.3g} s, log: {log}")
        elif event.phase is Phase.FAILED:
            self.failures.append(_failure_report(event))
        if name in self._followers:
            short, sentence = _describe(event)
            self._display.state(name, short, sentence)
            if event.phase is Phase.FAILED:
                sentence = event.log.error_line() or sentence
            self._record(name, event, text or sentence)
        self._display.refresh()

    def _record(self, name: str, event: Event, text: str) -> None:
        line = {"kind": "phase", "phase": str(event.phase), "text": text.replace(f"{ERROR_PREFIX} ", "")}
        try:
            append_line(self._events[name], json.dumps(line | {"code": event.code, "time": round(time.time(), 3)}))
        except OSError as error:
            self._display.note(f"{self._events[name]}: cannot be written: {error.strerror}")

    def show_metrics(self) -> None:
        """Show what the sites have written since the last call, or that they cannot write."""
        for name, follower in self._followers.items():
            for record in follower.poll():
                self._display.record(name, record)
            self._look_at_disk(name)
        self._display.refresh()

    def _look_at_disk(self, name: str) -> None:
        # Such a site has no other way to say so: its log is on that disk too.
        folder = self._events[name].parent
        if is_full(folder) == (name in self._without_room):
            return
        if name in self._without_room:
            self._without_room.remove(name)
            self._display.note(f"{name}: the disk of {folder} has room again")
        else:
            self._without_room.add(name)
            self._display.note(
                f"{name}: the disk of {folder} is full: the site trains on, but its logs and checkpoints cannot be written "
                "until there is room"
            )

    def stop_requests(self) -> int:
        """How often the user asked to stop; the first time is acknowledged."""
        if self._stops.count and not self._stop_is_acknowledged:
            self._stop_is_acknowledged = True
            self._display.note("the sites save and leave … (Ctrl-C again kills them at once)")
            self._display.refresh()
        return self._stops.count


def _describe(event: Event) -> tuple[str, str]:
    match event.phase:
        case Phase.RUNNING:
            return "starting", f"starting … log: {event.log.path}"
        case Phase.WAITING:
            return "restarting", "will be restarted"
        case Phase.FAILED:
            return "failed", f"failed with exit code {event.code}, log: {event.log.path}"
        case _:
            return str(event.phase), str(event.phase)


def _exit_reason(event: Event) -> str:
    left = event.code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    return "left, as it was asked to" if left else f"died with exit code {event.code}{_without_log(event)}"


def _without_log(event: Event) -> str:
    """Why the log may hold no reason."""
    return f": the disk of {event.log.path} is full, make room there" if is_full(event.log.path.parent) else ""


def _failure_report(event: Event) -> str:
    log, line = event.log, event.log.error_line()
    crashed = _CRASH.match(line or "")
    if line and not crashed:
        return line
    # Of a site's ranks one has failed by itself; what the others say last is that they have lost it.
    lines = log.tail(rank=int(crashed[1])) if crashed else []
    title = line or f"{event.job.name} failed with exit code {event.code}{_without_log(event)}"
    lines = lines or log.tail()
    return "\n".join([f"{title}; the end of {log.path}:", *(f"  | {each}" for each in lines)]) if lines else title
