"""What each method came to at its best learning rate, over the seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite
from statistics import mean, stdev

from titan_ext.experiments.convergence.methods import METHODS
from titan_ext.experiments.convergence.settings import Result, Run
from titan_ext.experiments.curves import steps_to
from titan_ext.experiments.store import check_tokens
from titan_ext.experiments.tuning import best_rate, tried


@dataclass(frozen=True, slots=True)
class Outcome:
    """One method's runs at its best learning rate."""

    method: str
    lr: float
    grid: Mapping[float, float]
    """Validation loss of each learning rate that was tried."""
    runs: Sequence[Result]
    """One for each seed."""

    @property
    def label(self) -> str:
        """The method's name for people."""
        return METHODS[self.method].label

    @property
    def losses(self) -> list[float]:
        """Last validation loss of each seed, in nats a token."""
        return [run.loss for run in self.runs]

    @property
    def loss(self) -> float:
        """Their mean."""
        return mean(self.losses)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation; None for a single seed or where a run diverged."""
        return stdev(self.losses) if len(self.runs) > 1 and isfinite(self.loss) else None

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, of a token."""
        return exp(self.loss)

    @property
    def bytes_sent(self) -> int:
        """Bytes that a site sent in the run."""
        return self.runs[0].bytes_sent[-1]

    def curve(self) -> list[tuple[int, float, int]]:
        """Step, mean loss and bytes of each measurement up to the first that diverged."""
        steps, sent = self.runs[0].steps, self.runs[0].bytes_sent
        together = zip(steps, zip(*(run.losses for run in self.runs)), sent)
        return [(step, mean(losses), size) for step, losses, size in together if None not in losses]

    def steps_to(self, target: float) -> float | None:
        """Step at which the mean loss first is down at ``target``, between measurements in a straight line."""
        return steps_to(((step, loss) for step, loss, _ in self.curve()), target)


def outcomes(methods: Iterable[str], seeds: int, done: Mapping[Run, Result]) -> dict[str, Outcome]:
    """The outcome of each method.

    Raises:
        RunError: two runs of one seed saw different tokens, which only results of another time can have.
    """
    check_tokens(done)
    found = {}
    for method in methods:
        lr = best_rate(method, done)
        runs = [done[Run(method, lr, seed)] for seed in range(seeds)]
        found[method] = Outcome(method, lr, tried(method, done), runs)
    return found
