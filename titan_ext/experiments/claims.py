"""What a paper leads one to expect of a comparison, and whether it came out so."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import mean, stdev
from typing import Any

# 97.5% quantiles of Student's distribution for 1, 2, … degrees of freedom; beyond, the normal distribution's.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.96


def claim(text: str, holds: bool, figures: str) -> dict[str, Any]:
    """One expectation as a row of figures: the ``claim``, whether it ``holds``, and the ``figures`` in words."""
    return {"claim": text, "holds": holds, "figures": figures}


def print_claims(title: str, claims: Iterable[Mapping[str, Any]]) -> None:
    """Print each claim and what came out."""
    print(title)
    for each in claims:
        print(f"{'holds' if each['holds'] else 'does NOT hold'}: {each['claim']}\n    {each['figures']}")


@dataclass(frozen=True, slots=True)
class SeedDifferences:
    """What one method's runs have more than another's, seed by seed: both were trained on the same tokens."""

    values: Sequence[float]

    @classmethod
    def between(cls, ours: Sequence[float], theirs: Sequence[float]) -> "SeedDifferences":
        """``ours`` less ``theirs``; infinite values are runs that diverged."""
        return cls([left - right for left, right in zip(ours, theirs, strict=True)])

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.values)

    @property
    def noise(self) -> float:
        """Their standard deviation: 0 for a single seed, infinite where a run diverged."""
        if not all(map(isfinite, self.values)):
            return inf
        return stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def half_width(self) -> float | None:
        """Of the 95% interval of the mean by Student's t, over seeds; None for a single seed or where a run diverged."""
        count = len(self.values)
        if count < 2 or not isfinite(self.noise):
            return None
        quantile = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else _NORMAL
        return quantile * self.noise / sqrt(count)

    @property
    def is_below(self) -> bool:
        """Whether the mean is below 0 by more than the noise."""
        return self.mean < -self.noise

    @property
    def is_not_above(self) -> bool:
        """Whether the mean is at most the noise, and no run diverged."""
        return all(map(isfinite, self.values)) and self.mean <= self.noise

    def text(self, form: str = "+.4f") -> str:
        """``-0.0200, noise 0.0010``: the mean in a signed format, and the noise in the same without sign."""
        return f"{self.mean:{form}}, noise {self.noise:{form[1:]}}"
