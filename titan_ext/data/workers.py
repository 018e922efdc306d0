"""The processes in which a loader reads ahead: how they end, and how their errors read."""

import multiprocessing
import multiprocessing.util
import signal
from collections.abc import Iterator
from functools import cache

from titan_ext.data.packing import Sample
from titan_ext.errors import RunError, UserError
from titan_ext.launcher.processes import die_with_parent


def end_with_the_rank(worker: int) -> None:
    """What tells the rank to leave tells its loader workers too; they read on until it has left."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


@cache
def end_workers_with(process: int) -> None:
    """At the process's end multiprocessing asks its children with SIGTERM, and waits for ever for those that ignore it."""
    del process  # a fork has finalizers of its own
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def with_short_errors(batches: Iterator[Sample]) -> Iterator[Sample]:
    """The batches; an error of a worker as the one line that it was raised with."""
    try:
        yield from batches
    except (UserError, RunError) as error:
        # A worker's error arrives with the worker's whole traceback as its message.
        last = str(error).strip().splitlines()[-1]
        raise type(error)(last.partition(f"{type(error).__name__}: ")[2] or last) from None
