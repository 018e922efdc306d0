"""What each variant came to over the seeds, at each number of iterations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf
from statistics import mean, stdev

from titan_ext.experiments.abbie.settings import Result
from titan_ext.experiments.abbie.variants import VARIANTS, training_of
from titan_ext.experiments.convergence.settings import Run
from titan_ext.experiments.store import check_tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """One variant's runs."""

    variant: str
    iterations: tuple[int, ...]
    """The numbers it was evaluated at."""
    runs: Sequence[Result]
    """One for each seed."""

    @property
    def label(self) -> str:
        """The variant's name for people."""
        return VARIANTS[self.variant].label

    def losses(self, iterations: int) -> list[float]:
        """Validation loss of each seed, in nats a token; infinite where it is no number."""
        place = self.iterations.index(iterations)
        return [inf if (loss := run.losses[self.variant][place]) is None else loss for run in self.runs]

    def perplexity(self, iterations: int) -> tuple[float, float | None]:
        """Mean of ``exp(loss)`` and its standard deviation; None for a single seed or where a run diverged."""
        each = [exp(loss) for loss in self.losses(iterations)]
        return mean(each), stdev(each) if len(each) > 1 and inf not in each else None

    def cosine(self, iterations: int) -> float | None:
        """Mean over the seeds of ``Result.cosines``."""
        return self._mean([run.cosines[self.variant] for run in self.runs], iterations)

    def size(self, iterations: int) -> float | None:
        """Mean over the seeds of ``Result.sizes``."""
        return self._mean([run.sizes[self.variant] for run in self.runs], iterations)

    def _mean(self, by_seed: list[list[float | None]], iterations: int) -> float | None:
        values = [each[self.iterations.index(iterations)] for each in by_seed]
        return None if None in values else mean(values)


def outcomes(
    variants: Iterable[str], iterations: tuple[int, ...], lr: float, seeds: int, done: Mapping[Run, Result]
) -> dict[str, Outcome]:
    """The outcome of each variant.

    Raises:
        RunError: two runs of one seed saw different tokens, which only results of another time can have.
    """
    check_tokens(done)
    return {
        variant: Outcome(variant, iterations, [done[Run(training_of(variant), lr, seed)] for seed in range(seeds)])
        for variant in variants
    }
