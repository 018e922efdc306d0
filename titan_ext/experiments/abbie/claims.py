"""What the paper, and a small experiment before this one, lead one to expect, and whether it came out so."""

from collections.abc import Iterator, Mapping
from math import exp, inf, isfinite
from statistics import mean, stdev
from typing import Any

from titan_ext.experiments.abbie.outcome import Outcome

_TRAINED, _MORE, _MOST = 2, 4, 8
# "Far smaller": at most this share of variant C's rise.
_FAR_SMALLER = 0.5
_READINGS = ("d_prev", "d_input", "d_prev_final", "d_input_final")


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
        claim
        for judge, (variants, counts) in judges.items()
        if variants <= found.keys() and counts <= set(iterations)
        for claim in judge(found)
    ]


def _second_iteration(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    for variant in ("c", "d_prev"):
        change = _change(found[variant], 1, _TRAINED)
        label = found[variant].label
        yield _claim(f"{label}: perplexity at 2 iterations is below that at 1", _falls(change), _text(change))


def _below_standard(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    change = _difference(found["d_prev"].losses(_TRAINED), found["standard"].losses(1))
    yield _claim(
        "D at 2 iterations is below the standard decoder's perplexity (by up to 5% in the paper)",
        _falls(change),
        f"{_text(change)}; perplexity {exp(mean(change)) - 1:+.1%}",
    )


def _extrapolation(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    theirs = mean(_change(found["c"], _TRAINED, _MOST))
    for variant in _READINGS:
        if variant in found:
            ours = mean(_change(found[variant], _TRAINED, _MOST))
            label = found[variant].label
            yield _claim(
                f"{label}: loses far less than C from 2 to 8 iterations (at most {_FAR_SMALLER:.0%} of it)",
                ours <= _FAR_SMALLER * theirs,
                f"loss {ours:+.4f}, of C {theirs:+.4f}",
            )


def _beyond_training(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    change = _change(found["d_prev"], _TRAINED, _MORE)
    yield _claim(
        "D at 4 iterations is below D at 2 (the paper's at 350M parameters; not expected of far smaller ones)",
        _falls(change),
        _text(change),
    )


def _depth(found: Mapping[str, Outcome]) -> Iterator[dict[str, Any]]:
    for count in (1, _MOST):
        theirs, ours = (_change(found[variant], _TRAINED, count) for variant in ("depth", "d_prev"))
        yield _claim(
            f"depth recurrence loses more than D where trained for 2 iterations and run with {count}",
            _falls(_difference(ours, theirs)),
            f"loss {mean(theirs):+.4f}, of D {mean(ours):+.4f}",
        )


def _change(outcome: Outcome, before: int, after: int) -> list[float]:
    """Of each seed, the loss at ``after`` iterations less that at ``before``."""
    return _difference(outcome.losses(after), outcome.losses(before))


def _difference(left: list[float], right: list[float]) -> list[float]:
    return [ours - theirs for ours, theirs in zip(left, right, strict=True)]


def _falls(change: list[float]) -> bool:
    return mean(change) < -_noise(change)


def _noise(change: list[float]) -> float:
    if not all(map(isfinite, change)):
        return inf
    return stdev(change) if len(change) > 1 else 0.0


def _text(change: list[float]) -> str:
    return f"loss {mean(change):+.4f}, noise {_noise(change):.4f}"


def _claim(claim: str, holds: bool, figures: str) -> dict[str, Any]:
    return {"claim": claim, "holds": holds, "figures": figures}
