"""What the paper leads one to expect of the comparison, and whether it came out so."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from statistics import mean, stdev
from typing import Any

from titan_ext.experiments.dept.arms import STANDARD
from titan_ext.experiments.dept.costs import Costs
from titan_ext.experiments.dept.outcome import Outcome

# Padding rows of a table, and telling the others which rows a site holds, are no part of the formulas.
_TOLERANCE = 0.05


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
            claim
            for outcome in others
            for claim in (_adaptation(outcome, found[STANDARD], target), _continued(outcome, found[STANDARD]))
        ] + judged
    return judged


def _adaptation(ours: Outcome, standard: Outcome, target: float) -> dict[str, Any]:
    steps = _difference(ours.steps_to(target), standard.steps_to(target))
    losses = _difference(ours.adapted_losses, standard.adapted_losses)
    return _claim(
        f"{ours.label}'s body adapts at least as fast as {standard.label}'s",
        _not_above(steps),
        f"steps to {target:.4f}: {_text(steps, '+.1f')}; loss after the last: {_text(losses, '+.4f')}",
    )


def _continued(ours: Outcome, standard: Outcome) -> dict[str, Any]:
    losses = _difference(ours.losses, standard.losses)
    return _claim(
        f"{ours.label} is at or below {standard.label}'s loss after the same continued pre-training",
        _not_above(losses),
        f"normalised loss {_text(losses, '+.4f')}",
    )


def _costs(found: Mapping[str, Outcome], spent: Mapping[str, Costs]) -> Iterator[dict[str, Any]]:
    for arm, outcome in found.items():
        each = spent[arm]
        memory = each.parameters / each.parameters_by_formula
        sent = each.bytes_a_round / each.bytes_a_round_by_formula
        yield _claim(
            f"{outcome.label} holds and sends what the formulas say, within {_TOLERANCE:.0%}",
            max(abs(memory - 1), abs(sent - 1)) <= _TOLERANCE,
            f"parameters {memory:.4f} and bytes {sent:.4f} times the formula's",
        )


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [left - right for left, right in zip(ours, theirs, strict=True)]


def _not_above(differences: Sequence[float]) -> bool:
    return all(map(isfinite, differences)) and mean(differences) <= _noise(differences)


def _noise(differences: Sequence[float]) -> float:
    if not all(map(isfinite, differences)):
        return inf
    return stdev(differences) if len(differences) > 1 else 0.0


def _text(differences: Sequence[float], form: str) -> str:
    return f"{mean(differences):{form}}, noise {_noise(differences):{form[1:]}}"


def _claim(claim: str, holds: bool, figures: str) -> dict[str, Any]:
    return {"claim": claim, "holds": holds, "figures": figures}
