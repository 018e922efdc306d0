"""From what happens to the sites to what is shown of it."""

import re
import signal
from collections.abc import Mapping

from titan_ext.launcher.display import Display
from titan_ext.launcher.follow import JsonLinesFollower
from titan_ext.launcher.interrupt import StopRequests
from titan_ext.launcher.log import ERROR_PREFIX
from titan_ext.launcher.supervisor import Event, Phase

# A rank that met with what it did not expect, and left its traceback in the log.
_CRASH = re.compile(rf"{ERROR_PREFIX} rank (\d+): ")


class RunWatch:
    """Passes the sites' metrics and fates on to a display.

    Args:
        display: where to show them.
        followers: name of the site -> its ``metrics.jsonl``.
        max_restarts: to say how many are left.
        stops: what the user asked for.
    """

    def __init__(
        self,
        display: Display,
        followers: Mapping[str, JsonLinesFollower],
        *,
        max_restarts: int,
        stops: StopRequests,
    ) -> None:
        self._display = display
        self._followers = followers
        self._max_restarts = max_restarts
        self._stops = stops
        self._stop_is_noted = False
        self.failures: list[str] = []
        """What is to be said at the end about processes that failed for good."""

    def on_event(self, event: Event) -> None:
        """A job changed its phase."""
        # What it wrote before it ended comes before the news of its end.
        self.show_metrics()
        name, log = event.job.name, event.log.path
        if event.phase is Phase.WAITING:
            reason = event.log.error_line() or _fate(event)
            self._display.note(
                f"{name}: {reason}; restart {event.restarts} of {self._max_restarts} in {event.delay:g} s, log: {log}"
            )
        elif event.phase is Phase.FAILED:
            self.failures.append(_obituary(event))
        if name in self._followers:
            word, sentence = _describe(event)
            self._display.state(name, word, sentence)
        self._display.refresh()

    def show_metrics(self) -> None:
        """Show what the sites have written since the last call."""
        for name, follower in self._followers.items():
            for record in follower.poll():
                self._display.record(name, record)
        self._display.refresh()

    def stop_requests(self) -> int:
        """How often the user asked to stop; the first time is acknowledged."""
        if self._stops.count and not self._stop_is_noted:
            self._stop_is_noted = True
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


def _fate(event: Event) -> str:
    left = event.code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    return "left, as it was asked to" if left else f"died with exit code {event.code}"


def _obituary(event: Event) -> str:
    log, line = event.log, event.log.error_line()
    crashed = _CRASH.match(line or "")
    if line and not crashed:
        return line
    # Of a site's ranks one has failed by itself; what the others say last is that they have lost it.
    lines = log.tail(rank=int(crashed[1])) if crashed else []
    title = line or f"{event.job.name} failed with exit code {event.code}"
    return "\n".join([f"{title}; the end of {log.path}:", *(f"  | {each}" for each in lines or log.tail())])
