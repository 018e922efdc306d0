"""Worker processes that train runs side by side."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from titan_ext.bench.crew import Crew
from titan_ext.experiments.convergence.settings import Run


class Team:
    """Processes that take the next run when they are done with one.

    Use it as a context manager: the processes start with the first run and end with it.

    Args:
        build: makes what each process holds, whose ``train(run)`` returns a result; importable by name.
        arguments: those of ``build``.
        workers: how many processes; to be read as ``workers``.
    """

    def __init__(self, build: Callable[..., Any], arguments: tuple, workers: int) -> None:
        self._build = build
        self._arguments = arguments
        self.workers = workers
        self._idle: SimpleQueue[Crew] = SimpleQueue()
        self._stack = ExitStack()
        self._started = False

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def train(self, runs: Iterable[Run]) -> Iterator[tuple[Run, Any]]:
        """Train runs; yields each with its result as it ends.

        Raises:
            RunError: a process failed.
        """
        self._start()
        pool = ThreadPoolExecutor(self.workers)
        futures = [pool.submit(self._train, run) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            # Not waited for: after Ctrl-C the threads end when their processes do.
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        if not self._started:
            for _ in range(self.workers):
                self._idle.put(self._stack.enter_context(Crew(self._build, [self._arguments])))
            self._started = True

    def _train(self, run: Run) -> tuple[Run, Any]:
        crew = self._idle.get()
        try:
            return run, crew.call("train", run)[0]
        finally:
            self._idle.put(crew)
