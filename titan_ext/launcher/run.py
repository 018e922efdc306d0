"""A run of jobs from outside: keeps them going, shows what the sites write, and reports how it ended."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ext.errors import RunError
from titan_ext.instruments.places import EVENTS
from titan_ext.launcher.display import Display, LineDisplay, TableDisplay
from titan_ext.launcher.processes import adopt_orphans, descendants, kill_descendants
from titan_ext.launcher.results import JsonLinesFollower, SummaryFile, compare_shared_state, results_table
from titan_ext.launcher.run_monitor import RunMonitor
from titan_ext.launcher.supervisor import INTERRUPTED, Job, StopRequests, Supervisor


@dataclass(frozen=True, slots=True)
class LaunchedSite:
    """A site as the launcher sees it from outside."""

    name: str
    folder: Path
    steps: int


def run_jobs(
    jobs: Sequence[Job],
    sites: Sequence[LaunchedSite],
    *,
    max_restarts: int,
    plain: bool,
    complete: bool,
    on_tick: Callable[[], None] = lambda: None,
    **timing: Any,
) -> int:
    """Run jobs to their end, showing what the sites write, and report.

    Args:
        jobs: what to keep running.
        sites: whose metrics and summaries to follow.
        max_restarts: for each job.
        plain: lines even in a terminal.
        complete: these are all the sites of the run.
        on_tick: called some times a second; what it raises ends the run in order.
        timing: ``backoff_seconds``, ``restart_seconds``, ``grace_seconds`` and ``poll_seconds`` of the supervisor.

    Returns:
        The exit code.
    """
    summaries = {site.name: SummaryFile(site.folder / "summary.json") for site in sites}
    followers = {site.name: JsonLinesFollower(site.folder / "metrics.jsonl") for site in sites}
    adopt_orphans()
    others = descendants(os.getpid())  # which the caller has started
    with StopRequests() as stops:
        events = {site.name: site.folder / EVENTS for site in sites}
        monitor = RunMonitor(_display(sites, plain), followers, events=events, max_restarts=max_restarts, stops=stops)

        def tick() -> None:
            monitor.show_metrics()
            on_tick()

        supervisor = Supervisor(
            jobs,
            max_restarts=max_restarts,
            stop_requests=monitor.stop_requests,
            on_event=monitor.on_event,
            on_tick=tick,
            **timing,
        )
        try:
            code = supervisor.run()
        finally:
            kill_descendants(os.getpid(), spare=others)
        monitor.show_metrics()
    for failure in dict.fromkeys(monitor.failures):  # the nodes of a site say the same
        print(failure, file=sys.stderr)
    if code:
        print("stopped" if code == INTERRUPTED else "the run failed", file=sys.stderr)
        return code
    return _report(summaries, complete)


def _report(summaries: dict[str, SummaryFile], complete: bool) -> int:
    if not summaries:
        print("this node has ended well; the site's losses and its summary are at another")
        return 0
    found = {name: summary.read() for name, summary in summaries.items()}
    print("\n" + "\n".join(results_table(found)))
    sound, sentence = compare_shared_state(found, complete=complete)
    if not sound:
        raise RunError(sentence)
    print(sentence)
    return 0


def _display(sites: Sequence[LaunchedSite], plain: bool) -> Display:
    totals = {site.name: site.steps for site in sites}
    live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not plain
    return TableDisplay(totals, sys.stdout) if live else LineDisplay(totals, sys.stdout)
