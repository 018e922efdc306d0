"""Worker processes that train runs side by side."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from queue import SimpleQueue

from titan_ext.bench.convergence_runs.settings import Result, Run, Settings
from titan_ext.bench.convergence_runs.train import Trainee
from titan_ext.bench.crew import Crew


class Team:
    """Processes that take the next run when they are done with one.

    Use it as a context manager: the processes start with the first run and end with it.

    Args:
        settings: those of the comparison.
        workers: how many processes.
        threads: threads that torch may compute with in each.
    """

    def __init__(self, settings: Settings, workers: int, threads: int) -> None:
        self.workers = workers
        self._arguments = (settings, threads)
        self._idle: SimpleQueue[Crew] = SimpleQueue()
        self._stack = ExitStack()
        self._started = False

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def train(self, runs: Iterable[Run]) -> Iterator[tuple[Run, Result]]:
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
                self._idle.put(self._stack.enter_context(Crew(Trainee, [self._arguments])))
            self._started = True

    def _train(self, run: Run) -> tuple[Run, Result]:
        crew = self._idle.get()
        try:
            return run, crew.call("train", run)[0]
        finally:
            self._idle.put(crew)
