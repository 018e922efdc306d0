"""Which runs a comparison still lacks: every learning rate of the grid on one seed, then all seeds at the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# How often a method's grid is widened while its best rate lies at the edge.
_WIDENINGS = 4
_TUNED_ON = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    method: str
    lr: float
    seed: int


class HasLoss(Protocol):
    """A result that learning rates are tuned by."""

    @property
    def loss(self) -> float:
        """Infinite for a run that diverged."""


def missing_runs(grids: Mapping[str, Sequence[float]], seeds: int, done: Mapping[Run, HasLoss]) -> list[Run]:
    """The runs to do next; empty once every method is tuned and has all its seeds.

    A grid of one rate is taken as it is.

    Args:
        grids: ascending learning rates by method.
        seeds: runs at the best rate.
        done: what has been run.
    """
    return [run for method, grid in grids.items() for run in _missing_of(method, grid, seeds, done)]


def tried(method: str, done: Mapping[Run, HasLoss]) -> dict[float, float]:
    """Validation loss of each learning rate that a method was tuned over, ascending."""
    losses = {run.lr: result.loss for run, result in done.items() if (run.method, run.seed) == (method, _TUNED_ON)}
    return dict(sorted(losses.items()))


def best_rate(method: str, done: Mapping[Run, HasLoss]) -> float:
    """The learning rate of the lowest validation loss; the lowest rate if all diverged."""
    losses = tried(method, done)
    return min(losses, key=losses.__getitem__)


def _missing_of(method: str, grid: Sequence[float], seeds: int, done: Mapping[Run, HasLoss]) -> list[Run]:
    known = tried(method, done)
    lacking = [lr for lr in grid if lr not in known]
    if not lacking:
        lacking = _beyond_edge(list(known), best_rate(method, done), len(grid))
    if lacking:
        return [Run(method, lr, _TUNED_ON) for lr in lacking]
    runs = [Run(method, best_rate(method, done), seed) for seed in range(seeds)]
    return [run for run in runs if run not in done]


def _beyond_edge(rates: list[float], best: float, planned: int) -> list[float]:
    """The next rate beyond the best one if that is the first or last: as far from it as its neighbour, as a ratio."""
    if len(rates) < 2 or len(rates) >= planned + _WIDENINGS:
        return []
    if best == rates[0]:
        return [rounded_rate(rates[0] * rates[0] / rates[1])]
    return [rounded_rate(rates[-1] * rates[-1] / rates[-2])] if best == rates[-1] else []


def rounded_rate(lr: float) -> float:
    """To four digits, so that a rate has one name however it was computed."""
    return float(f"{lr:.4g}")
