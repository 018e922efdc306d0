"""Which site, or which worker of a machine, trains which sources: Pollen (arXiv 2306.17453).

Sources are placed longest first by the time that a model of each worker predicts, so that all end at about the same
time. As long as some worker's time is not known, they are dealt out in turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from titan_ext.errors import require

_TYPICAL_BATCHES = 3.0
"""Size of a source at which Pollen compares how fast workers are."""
_LEAST_SECONDS = 1e-8


@dataclass(frozen=True, slots=True)
class Worker:
    """What trains one source at a time: a site, or a process on one of a machine's devices."""

    name: str
    predict: Callable[[float], float | None] = lambda batches: None
    """Seconds that a source of so many batches takes, such as ``MeasuredTimes.seconds``; None while that is not known."""
    concurrency: int = 1
    """Sources that it trains beside each other."""

    @property
    def is_known(self) -> bool:
        """Whether its times are."""
        return self.predict(_TYPICAL_BATCHES) is not None

    def seconds(self, batches: float) -> float:
        """Predicted seconds of a source."""
        return max(_LEAST_SECONDS, self.predict(batches) or 0.0)


def round_robin(sizes: Sequence[float], workers: Sequence[Worker]) -> list[list[int]]:
    """Deal sources out in turn; indices of sources for each worker, in order."""
    _require_workers(workers)
    return [list(range(place, len(sizes), len(workers))) for place in range(len(workers))]


def longest_first(sizes: Sequence[float], workers: Sequence[Worker]) -> list[list[int]]:
    """Place the largest source left on the worker that has least to do (Pollen's policy ``lb``).

    The fastest workers come first: one source to each, and of workers with equal loads the fastest.

    Args:
        sizes: batches of each source.
        workers: whose times are known.

    Returns:
        for each worker the indices of its sources, the largest first; those of a worker with several at a time in one list.
    """
    _require_workers(workers)
    lanes = [place for place in _fastest_first(workers) for _ in range(workers[place].concurrency)]
    loads = [0.0] * len(lanes)
    placed: list[list[int]] = [[] for _ in workers]
    for rank, source in enumerate(sorted(range(len(sizes)), key=lambda index: -sizes[index])):
        lane = rank if rank < len(lanes) else min(range(len(lanes)), key=loads.__getitem__)
        placed[lanes[lane]].append(source)
        loads[lane] += workers[lanes[lane]].seconds(sizes[source])
    return placed


def place(sizes: Sequence[float], workers: Sequence[Worker]) -> list[list[int]]:
    """Where each source goes: longest first, or in turn as long as some worker's time is not known.

    Pure: equal arguments lead to equal placements at all sites. A worker that has left is none of ``workers``, and its
    sources are placed with the others.

    Args:
        sizes: batches of each source.
        workers: at least one.

    Returns:
        for each worker the indices of its sources.
    """
    return longest_first(sizes, workers) if all(worker.is_known for worker in workers) else round_robin(sizes, workers)


def makespan(sizes: Sequence[float], workers: Sequence[Worker], placed: Sequence[Sequence[int]]) -> float:
    """Seconds until the last worker is done, by the workers' predictions; each trains one source at a time."""
    loads = (
        sum(worker.seconds(sizes[index]) for index in indices) for worker, indices in zip(workers, placed, strict=True)
    )
    return max(loads, default=0.0)


def _fastest_first(workers: Sequence[Worker]) -> list[int]:
    return sorted(range(len(workers)), key=lambda place: workers[place].seconds(_TYPICAL_BATCHES))


def _require_workers(workers: Sequence[Worker]) -> None:
    require(len(workers) > 0, "workers", len(workers), "at least 1")
    for worker in workers:
        require(worker.concurrency >= 1, f"concurrency of {worker.name}", worker.concurrency, "at least 1")
