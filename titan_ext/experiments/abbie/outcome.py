"""What each variant came to after each length of training, and whether that is what the paper leads one to expect."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from titan_ext.experiments.abbie.variants import VARIANTS, Result, Settings, training_of
from titan_ext.experiments.claims import SeedDifferences, claim
from titan_ext.experiments.report import TunedOutcome, tuned_outcomes
from titan_ext.experiments.tuning import Run

TRAINED = 2
"""Iterations in training of all but the standard decoder."""

HYPOTHESES = {
    "standard": "A second application of the body, by the same parameters, is worth something once training has gone on for "
    "long enough: from some length of training on, variants C and D at 2 iterations are below the standard decoder that "
    "was trained on the same tokens, each at its best learning rate. Against it: the difference's interval reaches 0 or "
    "above at the longest training too.",
    "beyond": "More iterations than trained raise the loss (a) because the latent state is longer than any that the tail "
    "has learned on: brought back to its norm at 2 iterations (rescaled), it loses little; or because of (b) a training "
    "that is too short: the rise falls with its length; (c) too few blocks: with twice as many it is less; (d) a training "
    "at 2 iterations alone: trained at 1 to 3 it is less. Against the paper: the loss at 4 is above that at 2 whatever is "
    "done.",
}
# "Far smaller", "little": at most this share of what it is compared with.
_FAR_SMALLER = 0.5
_READINGS = ("d_prev", "d_input", "d_prev_final", "d_input_final")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One variant's runs at its best learning rate."""

    variant: str
    settings: Settings
    tuned: TunedOutcome[Result]

    @property
    def label(self) -> str:
        """The variant's name for people."""
        return VARIANTS[self.variant].label

    @property
    def trained(self) -> int:
        """Iterations in training."""
        return 1 if self.variant == "standard" else TRAINED

    def values(self, key: str, steps: int, iterations: int) -> list[float | None]:
        """A field of ``Result`` that is kept by variant, of each seed; None where it is no number."""
        place, count = self.settings.steps.index(steps), self.settings.iterations.index(iterations)
        return [getattr(run, key)[self.variant][place][count] for run in self.tuned.runs]

    def losses(self, steps: int, iterations: int, key: str = "losses") -> list[float]:
        """Validation loss of each seed, in nats a token; infinite where it is no number."""
        return [inf if loss is None else loss for loss in self.values(key, steps, iterations)]

    def rise(self, steps: int, iterations: int, key: str = "losses") -> SeedDifferences:
        """Of each seed, the loss at ``iterations`` less that at the number of iterations of the training."""
        return SeedDifferences.between(self.losses(steps, iterations, key), self.losses(steps, self.trained))


Found = Mapping[str, Outcome]


def outcomes(variants: Iterable[str], settings: Settings, seeds: int, done: Mapping[Run, Result]) -> dict[str, Outcome]:
    """The outcome of each variant.

    Raises:
        RunError: two runs of one seed saw different tokens, which only results of another time can have.
    """
    names = list(variants)
    tuned = tuned_outcomes(TunedOutcome, dict.fromkeys(map(training_of, names)), seeds, done)
    return {variant: Outcome(variant, settings, tuned[training_of(variant)]) for variant in names}


def to_standard(found: Found, variant: str, steps: int) -> SeedDifferences:
    """What a variant's loss at the trained number of iterations is above the standard decoder's, by seed."""
    own, standard = found[variant], found["standard"]
    return SeedDifferences.between(own.losses(steps, own.trained), standard.losses(steps, standard.trained))


def claims(found: Found, settings: Settings) -> list[dict[str, Any]]:
    """Each claim whose variants and numbers of iterations were run: ``claim``, ``holds``, in words the ``figures``.

    A difference counts where its 95% interval over the seeds does not reach 0; both sides of it saw the same tokens.
    """
    return [*_below_standard(found, settings), *_beyond(found, settings), *_baselines(found, settings)]


def _below_standard(found: Found, settings: Settings) -> Iterator[dict[str, Any]]:
    for variant in ("c", "d_prev"):
        if variant not in found or "standard" not in found:
            continue
        apart = {steps: to_standard(found, variant, steps) for steps in settings.steps}
        label = found[variant].label
        for steps, each in apart.items():
            yield _difference(f"standard, {steps:,} steps: {label} at 2 iterations is below the standard decoder", each)
        above = [steps for steps, each in apart.items() if not is_below(each)]
        longer = [steps for steps in settings.steps if steps > max(above, default=0)]
        text = f"from {longer[0]:,} steps on" if longer else "not at the longest training"
        yield claim(
            f"standard, {label} is below the standard decoder from some length of training on", bool(longer), text
        )


def _beyond(found: Found, settings: Settings) -> Iterator[dict[str, Any]]:
    last = settings.steps[-1]
    for own in found.values():
        for count in _more(own, settings):
            rise = own.rise(last, count)
            name = f"beyond, {last:,} steps: {own.label}"
            yield _difference(f"{name} at {count} iterations is below itself at {own.trained}", rise)
            if is_below(_reversed(rise)):
                yield from _why_it_rises(found, own, count)


def _why_it_rises(found: Found, own: Outcome, count: int) -> Iterator[dict[str, Any]]:
    """Of a loss that rises from the trained to ``count`` iterations, what each of the leads explains."""
    first, last = own.settings.steps[0], own.settings.steps[-1]
    rise, rescaled = own.rise(last, count), own.rise(last, count, "rescaled")
    name = f"beyond, {last:,} steps: {own.label}"
    text = f"{rescaled.mean:+.4f} of {rise.mean:+.4f} nats remain"
    yield claim(
        f"{name}: at {count} the norm of the latent is what raises its loss",
        rescaled.mean <= _FAR_SMALLER * rise.mean,
        text,
    )
    if first < last:
        change = SeedDifferences.between(rise.values, own.rise(first, count).values)
        yield _difference(f"{name}: its rise at {count} is less than after {first:,} steps", change)
    for variant in ("d_deep", "d_sampled"):
        if own.variant == "d_prev" and variant in found:
            change = SeedDifferences.between(found[variant].rise(last, count).values, rise.values)
            label = found[variant].label
            yield _difference(f"{name}: its rise at {count} is more than that of {label}", change)


def _baselines(found: Found, settings: Settings) -> Iterator[dict[str, Any]]:
    """That one iteration is not enough, and what the paper says of C and of depth recurrence."""
    last, counts = settings.steps[-1], settings.iterations
    for variant in ("c", "d_prev"):
        if variant in found and 1 in counts:
            name = f"beyond, {last:,} steps: {found[variant].label} at {TRAINED} iterations is below itself at 1"
            yield _difference(name, _reversed(found[variant].rise(last, 1)))
    most = counts[-1]
    for variant in _READINGS:
        if {variant, "c"} <= found.keys() and most > TRAINED:
            ours, theirs = (found[each].rise(last, most).mean for each in (variant, "c"))
            text = f"{ours:+.4f} of {theirs:+.4f} nats"
            name = f"beyond, {last:,} steps: {found[variant].label} rises far less than C from 2 to {most} iterations"
            yield claim(f"{name} (at most {_FAR_SMALLER:.0%})", ours <= _FAR_SMALLER * theirs, text)
    if {"depth", "d_prev"} <= found.keys():
        for count in (each for each in counts if each != TRAINED):
            change = SeedDifferences.between(*(found[each].rise(last, count).values for each in ("d_prev", "depth")))
            yield _difference(f"beyond, {last:,} steps: D rises less than depth recurrence at {count}", change)


def _more(own: Outcome, settings: Settings) -> Sequence[int]:
    """Numbers of iterations beyond those of the training; none of the standard decoder, which is iterated as C is."""
    return [] if own.variant == "standard" else [each for each in settings.iterations if each > own.trained]


def is_below(differences: SeedDifferences) -> bool:
    """Whether the whole 95% interval is below 0; of a single seed the difference."""
    return differences.mean + (differences.half_width or 0.0) < 0


def _reversed(differences: SeedDifferences) -> SeedDifferences:
    return SeedDifferences([-each for each in differences.values])


def _difference(text: str, differences: SeedDifferences) -> dict[str, Any]:
    half = differences.half_width
    return claim(
        text, is_below(differences), f"{differences.mean:+.4f}" + ("" if half is None else f" ± {half:.4f}") + " nats"
    )
