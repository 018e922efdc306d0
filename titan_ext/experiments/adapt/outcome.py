"""What came of it: the figures of each arm, and what the paper leads one to expect of them."""

from collections.abc import Mapping
from statistics import mean
from typing import Any, TypeAlias

from titan_ext.experiments.adapt.arms import ARMS, BM25, ORACLE, PLAIN, SOURCES, STALE, STANDARDIZED, UNIFORM, Result
from titan_ext.experiments.claims import SeedDifferences, claim
from titan_ext.experiments.report import TunedOutcome, grid_figures, number

_Outcome: TypeAlias = TunedOutcome[Result]

_GAIN = "has a lower loss on the target than uniform weights"
_EXPECTED = (
    (f"there is something to gain: the oracle {_GAIN}", ORACLE, UNIFORM),
    (f"ADAPT as the paper has it {_GAIN}", PLAIN, UNIFORM),
    (f"ADAPT with centred and standardised scores {_GAIN}", STANDARDIZED, UNIFORM),
    (f"ADAPT by BM25 {_GAIN}", BM25, UNIFORM),
    ("standardised scores need anchors that are read often", STANDARDIZED, STALE),
    *(
        (f"under DiLoCo, {name}: ADAPT with anchors of {whose} {_GAIN}", f"diloco_{name}_{kind}", "diloco_uniform")
        for name in (PLAIN, STANDARDIZED)
        for kind, whose in (("own", "the site"), ("shared", "all sites"))
    ),
    *(
        (
            f"under DiLoCo, {name}: shared anchors are better for the one model than each site's own",
            f"diloco_{name}_shared",
            f"diloco_{name}_own",
        )
        for name in (PLAIN, STANDARDIZED, ORACLE)
    ),
)
"""A claim, the arm whose loss is to be lower, and the other one."""


def rows(found: Mapping[str, _Outcome]) -> list[dict[str, Any]]:
    """A row of figures for each arm."""
    return [_row(outcome, found) for outcome in found.values()]


def claims(found: Mapping[str, _Outcome]) -> list[dict[str, Any]]:
    """What the paper leads one to expect, and whether it came out so."""
    judged = []
    for text, ours, theirs in _EXPECTED:
        less = SeedDifferences.between(found[ours].losses, found[theirs].losses)
        judged.append(claim(text, less.is_below, f"loss {less.text()}"))
    for arm in (PLAIN, STANDARDIZED, BM25):
        for source in ("noise", "off_topic"):
            pair = [_weights(found[arm], each) for each in (source, "own")]
            if len(pair[0]) == len(pair[1]) == len(found[arm].runs):
                less = SeedDifferences.between(*pair)
                text = f"{arm}: {source.replace('_', '-')} text weighs less than the site's own target"
                judged.append(claim(text, less.is_below, f"weight {mean(pair[0]):.3f} against {mean(pair[1]):.3f}"))
    return judged


def _row(outcome: _Outcome, found: Mapping[str, _Outcome]) -> dict[str, Any]:
    reference = found["diloco_uniform" if ARMS[outcome.method].together else UNIFORM]
    less = SeedDifferences.between(outcome.losses, reference.losses)
    by_source = {name: _weights(outcome, name) for name in SOURCES}
    return {
        "label": outcome.method,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "deviation": number(outcome.deviation),
        "less": number(less.mean),
        "less_half_width": number(less.half_width),
        **{name: number(mean(each), 4) if each else None for name, each in by_source.items()},
        "curve": _curve(outcome),
        "grid": grid_figures(outcome),
    }


def _weights(outcome: _Outcome, source: str) -> list[float]:
    """Mean weight of a source in the second half of each seed's run; empty for arms without ADAPT."""
    place = SOURCES.index(source)
    halves = [run.weights[len(run.weights) // 2 :] for run in outcome.runs]
    known = [[each[place] for each in half if each[place] is not None] for half in halves]
    return [mean(each) for each in known if each]


def _curve(outcome: _Outcome) -> list[list[float | None]]:
    """By ``sync_every`` steps the mean weight of each source, of the first seed."""
    return [[number(weight, 4) for weight in each] for each in outcome.runs[0].weights]
