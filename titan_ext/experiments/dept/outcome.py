"""What each arm came to, what it costs, and whether that is what the paper leads one to expect."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite
from statistics import mean
from typing import Any, cast

from titan_ext.experiments.claims import SeedDifferences, claim
from titan_ext.experiments.dept.arms import ARMS, STANDARD, Measured, Result, Settings, mean_normalised, normalised
from titan_ext.experiments.report import TunedOutcome, steps_to
from titan_ext.models.dept.cost import Method, ModelSize, parameters_held, payload
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

_FP32 = 4
# Padding rows of a table, and telling the others which rows a site holds, are no part of the formulas.
_TOLERANCE = 0.05


class Outcome(TunedOutcome[Result]):
    """One arm's runs at its best learning rate; lists have a value for each seed.

    A loss is the mean unigram-normalised one after the continued pre-training.
    """

    @property
    def label(self) -> str:
        """The arm's name for people."""
        return ARMS[self.method].label

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


def common_target(found: Iterable[Outcome]) -> float | None:
    """The normalised loss that every run's adaptation reaches; None if all diverged."""
    last = [loss for outcome in found for loss in outcome.adapted_losses]
    return max(filter(isfinite, last), default=None)


def _mean_curve(runs: Sequence[Measured]) -> list[tuple[int, float]]:
    """Up to the first step at which a run had diverged."""
    together = zip(runs[0]["steps"], zip(*(mean_normalised(run) for run in runs)))
    return [(step, mean(losses)) for step, losses in together if inf not in losses]


@dataclass(frozen=True, slots=True)
class Costs:
    """Means over the sites."""

    vocabulary: float
    """Tokens of a site's vocabulary."""
    embedding: float
    """Parameters of a site's embedding, padding included."""
    parameters: float
    """Those of its whole model."""
    parameters_by_formula: float
    bytes_a_round: float
    """Bytes that a site sends in as many steps as a round has."""
    bytes_a_round_by_formula: float


def costs(outcome: Outcome, settings: Settings) -> Costs:
    """An arm's costs in its runs, which are equal in them."""
    run = outcome.runs[0]
    size = ModelSize(body=run.body, dim=settings.dim, vocabulary=run.joint_vocabulary)
    method = cast(Method, outcome.method)
    held = [parameters_held(method, size, own) for own in run.vocabularies]
    sent = [_FP32 * payload(method, size, own) for own in run.vocabularies]
    exchanges = settings.sync_every if outcome.method == STANDARD else 1
    return Costs(
        vocabulary=mean(run.vocabularies),
        embedding=mean(run.embeddings),
        parameters=run.body + mean(run.embeddings),
        parameters_by_formula=mean(held),
        bytes_a_round=mean(run.bytes_a_round),
        bytes_a_round_by_formula=exchanges * mean(ring_all_reduce_bytes(each, len(sent)) for each in sent),
    )


def claims(found: Mapping[str, Outcome], spent: Mapping[str, Costs], target: float | None) -> list[dict[str, Any]]:
    """Each claim that the arms of the comparison decide: ``claim``, ``holds`` and, in words, the ``figures``.

    Differences are those of the same seed; they count where their mean is larger than their standard deviation
    (0 for a single seed).

    Args:
        found: the arms' outcomes.
        spent: their costs.
        target: normalised loss that the steps of the adaptation are counted to.
    """
    judged = list(_costs(found, spent))
    if STANDARD in found and target is not None:
        others = [outcome for arm, outcome in found.items() if arm != STANDARD]
        judged = [
            each
            for outcome in others
            for each in (_adaptation(outcome, found[STANDARD], target), _continued(outcome, found[STANDARD]))
        ] + judged
    return judged


def _adaptation(ours: Outcome, standard: Outcome, target: float) -> dict[str, Any]:
    steps = SeedDifferences.between(ours.steps_to(target), standard.steps_to(target))
    losses = SeedDifferences.between(ours.adapted_losses, standard.adapted_losses)
    return claim(
        f"{ours.label}'s body adapts at least as fast as {standard.label}'s",
        steps.is_not_above,
        f"steps to {target:.4f}: {steps.text('+.1f')}; loss after the last: {losses.text()}",
    )


def _continued(ours: Outcome, standard: Outcome) -> dict[str, Any]:
    losses = SeedDifferences.between(ours.losses, standard.losses)
    return claim(
        f"{ours.label} is at or below {standard.label}'s loss after the same continued pre-training",
        losses.is_not_above,
        f"normalised loss {losses.text()}",
    )


def _costs(found: Mapping[str, Outcome], spent: Mapping[str, Costs]) -> Iterator[dict[str, Any]]:
    for arm, outcome in found.items():
        each = spent[arm]
        memory = each.parameters / each.parameters_by_formula
        sent = each.bytes_a_round / each.bytes_a_round_by_formula
        yield claim(
            f"{outcome.label} holds and sends what the formulas say, within {_TOLERANCE:.0%}",
            max(abs(memory - 1), abs(sent - 1)) <= _TOLERANCE,
            f"parameters {memory:.4f} and bytes {sent:.4f} times the formula's",
        )
