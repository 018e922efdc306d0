"""A line for each run that ends, with the time that the rest will take."""

import sys
import time

from titan_ext.experiments.convergence.settings import Result, Run


class Progress:
    """Counts runs; lines go to stderr.

    Args:
        planned: runs at least; widening a grid adds to them.
        workers: runs side by side.
    """

    def __init__(self, planned: int, workers: int) -> None:
        self._planned, self._workers = planned, workers
        self._started = time.perf_counter()
        self._done, self._trained, self._seconds = 0, 0, 0.0

    def tell(self, run: Run, result: Result, waiting: int, *, reused: bool = False) -> None:
        """A run has ended.

        Args:
            run: which.
            result: what came of it.
            waiting: runs already known to come after it.
            reused: whether it was found on disk.
        """
        self._done += 1
        if not reused:
            self._trained, self._seconds = self._trained + 1, self._seconds + result.seconds
        self._planned = max(self._planned, self._done + waiting)
        how = "found in --out" if reused else f"{result.seconds:.0f} s, {self._times()}"
        name = f"{run.method}, lr {run.lr:g}, seed {run.seed}"
        print(f"[{self._done}/{self._planned}] {name}: loss {result.loss:.4f} ({how})", file=sys.stderr, flush=True)

    def _times(self) -> str:
        left = (self._planned - self._done) * self._seconds / self._trained / self._workers
        return f"elapsed {_clock(time.perf_counter() - self._started)}, left about {_clock(left)}"


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"
