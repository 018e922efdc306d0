"""What each arm came to at its best learning rate, over the seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite
from statistics import mean

from titan_ext.experiments.convergence.settings import Run
from titan_ext.experiments.curves import steps_to
from titan_ext.experiments.dept.arms import ARMS
from titan_ext.experiments.dept.settings import Measured, Result, mean_normalised, normalised
from titan_ext.experiments.store import check_tokens
from titan_ext.experiments.tuning import best_rate, tried


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm's runs at its best learning rate; lists have a value for each seed."""

    arm: str
    lr: float
    grid: Mapping[float, float]
    """``Result.loss`` of each learning rate that was tried."""
    runs: Sequence[Result]
    """One for each seed."""

    @property
    def label(self) -> str:
        """The arm's name for people."""
        return ARMS[self.arm].label

    @property
    def losses(self) -> list[float]:
        """Mean unigram-normalised loss after the continued pre-training."""
        return [run.loss for run in self.runs]

    def normalised(self, stage: str, language: str) -> list[float]:
        """Last unigram-normalised loss of a language in a stage, a field of ``Result``."""
        return [normalised(getattr(run, stage), language)[-1] for run in self.runs]

    def perplexity(self, language: str) -> list[float]:
        """Of a token, after the continued pre-training."""
        last = [run.continued["losses"][language][-1] for run in self.runs]
        return [inf if loss is None else exp(loss) for loss in last]

    def continued(self) -> list[tuple[int, float]]:
        """Steps of the continued pre-training, and the mean normalised loss over languages and seeds."""
        return _mean_curve([run.continued for run in self.runs])

    def adapted(self) -> list[tuple[int, float]]:
        """Steps of the adaptation, and the mean normalised loss over the seeds."""
        return _mean_curve([run.adapted for run in self.runs])

    @property
    def adapted_losses(self) -> list[float]:
        """Normalised loss after the adaptation."""
        return [mean_normalised(run.adapted)[-1] for run in self.runs]

    def steps_to(self, target: float) -> list[float]:
        """Steps of the adaptation until the normalised loss is down at ``target``; infinite if it never is."""
        curves = [zip(run.adapted["steps"], mean_normalised(run.adapted)) for run in self.runs]
        return [inf if (steps := steps_to(curve, target)) is None else steps for curve in curves]


def outcomes(arms: Iterable[str], seeds: int, done: Mapping[Run, Result]) -> dict[str, Outcome]:
    """The outcome of each arm.

    Raises:
        RunError: two runs of one seed saw different tokens, which only results of another time can have.
    """
    check_tokens(done)
    found = {}
    for arm in arms:
        lr = best_rate(arm, done)
        found[arm] = Outcome(arm, lr, tried(arm, done), [done[Run(arm, lr, seed)] for seed in range(seeds)])
    return found


def common_target(found: Iterable[Outcome]) -> float | None:
    """The normalised loss that every run's adaptation reaches; None if all diverged."""
    last = [loss for outcome in found for loss in outcome.adapted_losses]
    return max(filter(isfinite, last), default=None)


def _mean_curve(runs: Sequence[Measured]) -> list[tuple[int, float]]:
    """Up to the first step at which a run had diverged."""
    together = zip(runs[0]["steps"], zip(*(mean_normalised(run) for run in runs)))
    return [(step, mean(losses)) for step, losses in together if inf not in losses]
