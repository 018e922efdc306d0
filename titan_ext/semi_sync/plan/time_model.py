"""How long a number of batches takes a site or a device: Pollen's time model (arXiv 2306.17453), fitted while it runs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

# Iteratively reweighted least squares, with the derivative of arctan(u) at u = (r / s)^2 as weight of a residual r.
_REPETITIONS = 20
_NORMAL_FROM_MEDIAN = 1.4826
_SMALLEST_SCALE = 1e-9
# One fit is better than another only by more than rounding; of equals the simpler one is taken.
_BETTER = 1 - 1e-6
_MOST_BATCHES = 2**40


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeModel:
    """``seconds = constant + logarithmic * log(batches) + linear * batches``, no coefficient negative.

    Hence more batches never take less time.
    """

    constant: float = 0.0
    """Seconds of a call, however many batches."""
    logarithmic: float = 0.0
    """Seconds."""
    linear: float = 0.0
    """Seconds of a batch."""

    def seconds(self, batches: float) -> float:
        """What ``batches`` take, at least 1; 0 for none."""
        if batches <= 0:
            return 0.0
        batches = max(batches, 1.0)
        return self.constant + self.logarithmic * math.log(batches) + self.linear * batches

    def batches_within(self, seconds: float, most: int = _MOST_BATCHES) -> int:
        """The largest number of batches, up to ``most``, that take no longer than ``seconds``; 0 if one takes longer."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle - 1)
        return low


def fit(observations: Sequence[tuple[float, float]]) -> TimeModel | None:
    """The model that observations follow, those apart that are out of line with the rest.

    Args:
        observations: batches (at least 1) and the seconds that they took.

    Returns:
        None without observations.
    """
    if not observations:
        return None
    batches, seconds = (torch.tensor(each, dtype=torch.float64) for each in zip(*observations, strict=True))
    terms = torch.stack([torch.ones_like(batches), batches.clamp(min=1).log(), batches], dim=1)
    weights = torch.ones_like(seconds)
    for _ in range(_REPETITIONS):
        coefficients = _non_negative(terms, seconds, weights)
        residuals = seconds - terms @ coefficients
        scale = _NORMAL_FROM_MEDIAN * residuals.abs().median() + _SMALLEST_SCALE
        weights = 1 / (1 + (residuals / scale) ** 4)
    constant, logarithmic, linear = coefficients.tolist()
    return TimeModel(constant=constant, logarithmic=logarithmic, linear=linear)


def _non_negative(terms: torch.Tensor, seconds: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted least squares with coefficients ``[3]`` of at least 0: the best of all sets of terms that allows it."""
    best, least = torch.zeros(3, dtype=torch.float64), math.inf
    roots = weights.sqrt()
    for active in _sets_of_terms():
        places = list(active)
        solution = torch.linalg.lstsq((terms[:, places] * roots[:, None]), seconds * roots).solution
        if bool((solution < 0).any()) or not bool(solution.isfinite().all()):
            continue
        error = float((weights * (seconds - terms[:, places] @ solution) ** 2).sum())
        if error < least * _BETTER:
            best, least = torch.zeros(3, dtype=torch.float64), error
            best[places] = solution
    return best


def _sets_of_terms() -> Iterator[tuple[int, ...]]:
    """Places of the terms that may differ from 0, first the linear one alone: a single observation says no more."""
    yield from [(2,), (0,), (1,)]
    yield from combinations(range(3), 2)
    yield (0, 1, 2)


class MeasuredTimes:
    """The time model of one site or device, learned from what its work took.

    Args:
        keep: observations that count, the latest ones.
    """

    def __init__(self, keep: int = 256) -> None:
        self._keep = keep
        self._observed: list[tuple[float, float]] = []
        self._this_round: list[tuple[float, float]] = []
        self._last_round: dict[float, float] = {}
        self._model: TimeModel | None = None
        self._is_fitted = True

    def observe(self, batches: float, seconds: float) -> None:
        """``batches``, at least 1, have just taken ``seconds``."""
        self._observed = [*self._observed, (float(batches), float(seconds))][-self._keep :]
        self._this_round.append((float(batches), float(seconds)))
        self._is_fitted = False

    def end_round(self) -> None:
        """What was observed since the last call is the last round's: it corrects the model where batches are the same."""
        taken: dict[float, list[float]] = {}
        for batches, seconds in self._this_round:
            taken.setdefault(batches, []).append(seconds)
        self._last_round = {batches: fmean(each) for batches, each in taken.items()}
        self._this_round = []

    @property
    def model(self) -> TimeModel | None:
        """Fitted to what has been observed so far; None before."""
        if not self._is_fitted:
            self._model, self._is_fitted = fit(self._observed), True
        return self._model

    def seconds(self, batches: float) -> float | None:
        """What ``batches`` will take; None before anything was observed.

        Where the last round had as many, the mean of the model's answer and of what they took then.
        """
        model = self.model
        if model is None:
            return None
        seen = self._last_round.get(float(batches))
        return model.seconds(batches) if seen is None else (model.seconds(batches) + seen) / 2

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "observed": list(self._observed),
            "this_round": list(self._this_round),
            "last_round": sorted(self._last_round.items()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._observed = [(batches, seconds) for batches, seconds in state["observed"]]
        self._this_round = [(batches, seconds) for batches, seconds in state["this_round"]]
        self._last_round = dict(state["last_round"])
        self._is_fitted = False
