"""What a method came to over the seeds, and its figures as JSON values and as text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev
from typing import Any, Generic, TypeVar

from titan_ext.experiments.runs import RunResult, check_tokens
from titan_ext.experiments.tuning import Run, best_rate, tried
from titan_ext.launcher.text import columns

R = TypeVar("R", bound=RunResult)
Tuned = TypeVar("Tuned", bound="TunedOutcome")


@dataclass(frozen=True, slots=True)
class TunedOutcome(Generic[R]):
    """One method's runs at its best learning rate."""

    method: str
    lr: float
    grid: Mapping[float, float]
    """Loss of each learning rate that was tried."""
    runs: Sequence[R]
    """One for each seed."""

    @property
    def losses(self) -> list[float]:
        """``Result.loss`` of each seed."""
        return [run.loss for run in self.runs]

    @property
    def loss(self) -> float:
        """Their mean."""
        return mean(self.losses)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation; None for a single seed or where a run diverged."""
        return deviation(self.losses)


def tuned_outcomes(
    kind: type[Tuned], methods: Iterable[str], seeds: int, done: Mapping[Run, RunResult]
) -> dict[str, Tuned]:
    """The outcome of each method, as objects of ``kind``.

    Raises:
        RunError: two runs of one seed were trained on different tokens.
    """
    check_tokens(done)
    best = {method: best_rate(method, done) for method in methods}
    return {
        method: kind(method, lr, tried(method, done), [done[Run(method, lr, seed)] for seed in range(seeds)])
        for method, lr in best.items()
    }


def number(value: float | None, digits: int = 5) -> float | None:
    """Rounded; None for what JSON cannot hold."""
    return round(value, digits) if value is not None and isfinite(value) else None


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation; None for a single seed or where a run diverged."""
    return stdev(values) if len(values) > 1 and all(map(isfinite, values)) else None


def steps_to(curve: Iterable[tuple[int, float]], target: float) -> float | None:
    """Step at which a curve first is down at ``target``, between measurements in a straight line; None: never."""
    before = None
    for step, loss in curve:
        if loss <= target:
            return step if before is None else step - (step - before[0]) * (target - loss) / (before[1] - loss)
        before = step, loss
    return None


def grid_figures(outcome: TunedOutcome) -> dict[str, float | None]:
    """Loss by learning rate, as JSON values."""
    return {f"{lr:g}": number(loss) for lr, loss in outcome.grid.items()}


def rates_tried(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines with each method's loss at every learning rate it was tuned over; a dash where it was not."""
    rates = sorted({lr for row in figures for lr in row["grid"]}, key=float)
    body = [[row["label"], *(_tuned(row["grid"], lr) for lr in rates)] for row in figures]
    return columns([["learning rate", *rates], *body])


def _tuned(grid: Mapping[str, float | None], lr: str) -> str:
    if lr not in grid:
        return "-"
    return "diverged" if grid[lr] is None else f"{grid[lr]:.4f}"
