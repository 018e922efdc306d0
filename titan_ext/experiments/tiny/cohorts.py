"""A pool of processes that each train several runs at once, which are alike in shape."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from titan_ext.experiments.runs import RunPool
from titan_ext.experiments.tuning import Run

_TOGETHER = 12
"""Runs of a cohort at most: beyond it, the arithmetic costs more than the calls that are saved, and an interruption more."""


class CohortPool(RunPool):
    """Trains runs of one shape together; their results come when all of a cohort are done.

    Args:
        train: called in a process as ``train(*arguments, runs)``; returns a result for each. Importable by name.
        arguments: the same for all runs.
        workers: how many processes.
        threads: threads that torch may compute with in each.
        shape: of a run; what differs in it is not trained together.
    """

    def __init__(
        self,
        train: Callable[..., Any],
        arguments: tuple,
        workers: int,
        threads: int,
        *,
        shape: Callable[[Run], Hashable],
    ) -> None:
        # Operations are too small to gain by threads, which would only wait for each other.
        super().__init__(train, arguments, workers, min(threads, 1))
        self._shape = shape

    def train(self, runs: Iterable[Run]) -> Iterator[tuple[Run, Any]]:
        """Train runs; yields each with its result as its cohort ends.

        Raises:
            RunError: a process failed.
        """
        cohorts: Any = self.cohorts(list(runs))
        for cohort, results in super().train(cohorts):
            yield from zip(cohort, results, strict=True)  # type: ignore[call-overload]

    def cohorts(self, runs: list[Run]) -> list[list[Run]]:
        """The runs in groups of one shape, each shared out over the processes."""
        groups: dict[Hashable, list[Run]] = defaultdict(list)
        for run in runs:
            groups[self._shape(run)].append(run)
        found = []
        for group in groups.values():
            count = max(-(-len(group) // _TOGETHER), min(self.workers, len(group) // 4))
            found += [group[place::count] for place in range(max(1, count))]
        return found
