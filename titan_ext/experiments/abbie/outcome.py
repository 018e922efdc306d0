"""What each variant came to at each number of iterations, and whether that is what the paper leads one to expect."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf
from statistics import mean
from typing import Any

from titan_ext.experiments.abbie.variants import VARIANTS, Result, training_of
from titan_ext.experiments.claims import SeedDifferences, claim
from titan_ext.experiments.report import deviation
from titan_ext.experiments.runs import check_tokens
from titan_ext.experiments.tuning import Run

_TRAINED, _MORE, _MOST = 2, 4, 8
# "Far smaller": at most this share of variant C's rise.
_FAR_SMALLER = 0.5
_READINGS = ("d_prev", "d_input", "d_prev_final", "d_input_final")


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
        return mean(each), deviation(each)

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


def claims(found: Mapping[str, Outcome], iterations: tuple[int, ...]) -> list[dict[str, Any]]:
    """Each claim whose variants and numbers of iterations were run: ``claim``, ``holds``, in words the ``figures``.

    A difference counts where its mean over the seeds is larger than its standard deviation (0 for a single seed);
    both sides of it saw the same tokens.
    """
    judges = {
        _second_iteration: ({"c", "d_prev"}, {1, _TRAINED}),
        _below_standard: ({"standard", "d_prev"}, {1, _TRAINED}),
        _extrapolation: ({"c"}, {_TRAINED, _MOST}),
        _beyond_training: ({"d_prev"}, {_TRAINED, _MORE}),
        _depth: ({"depth", "d_prev"}, {1, _TRAINED, _MOST}),
    }
    return [
        each
        for judge, (variants, counts) in judges.items()
        if variants <= found.keys() and counts <= set(iterations)
        for each in judge(found)
    ]


def _second_iteration(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    for variant in ("c", "d_prev"):
        change = _change(found[variant], 1, _TRAINED)
        label = found[variant].label
        yield claim(f"{label}: perplexity at 2 iterations is below that at 1", change.is_below, f"loss {change.text()}")


def _below_standard(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    change = SeedDifferences.between(found["d_prev"].losses(_TRAINED), found["standard"].losses(1))
    yield claim(
        "D at 2 iterations is below the standard decoder's perplexity (by up to 5% in the paper)",
        change.is_below,
        f"loss {change.text()}; perplexity {exp(change.mean) - 1:+.1%}",
    )


def _extrapolation(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    theirs = _change(found["c"], _TRAINED, _MOST).mean
    for variant in _READINGS:
        if variant in found:
            ours = _change(found[variant], _TRAINED, _MOST).mean
            label = found[variant].label
            yield claim(
                f"{label}: loses far less than C from 2 to 8 iterations (at most {_FAR_SMALLER:.0%} of it)",
                ours <= _FAR_SMALLER * theirs,
                f"loss {ours:+.4f}, of C {theirs:+.4f}",
            )


def _beyond_training(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    change = _change(found["d_prev"], _TRAINED, _MORE)
    yield claim(
        "D at 4 iterations is below D at 2 (the paper's at 350M parameters; not expected of far smaller ones)",
        change.is_below,
        f"loss {change.text()}",
    )


def _depth(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    for count in (1, _MOST):
        theirs, ours = (_change(found[variant], _TRAINED, count) for variant in ("depth", "d_prev"))
        yield claim(
            f"depth recurrence loses more than D where trained for 2 iterations and run with {count}",
            SeedDifferences.between(ours.values, theirs.values).is_below,
            f"loss {theirs.mean:+.4f}, of D {ours.mean:+.4f}",
        )


def _change(outcome: Outcome, before: int, after: int) -> SeedDifferences:
    """Of each seed, the loss at ``after`` iterations less that at ``before``."""
    return SeedDifferences.between(outcome.losses(after), outcome.losses(before))
