"""What each site puts into a round: its weight, and how large its updates are. Equal tables lead to equal means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

FEWEST_PEERS = 3
"""Of two updates none is the outlier."""


@dataclass(slots=True)
class Contributions:
    """A round's contributions, by the rank of the site in the quorum."""

    weights: list[float]
    """0 for a site that contributes nothing."""
    norms: list[list[float]]
    """``[site][guarded rule]``: Euclidean norm of its update."""

    @classmethod
    def own(cls, rank: int, sites: int, weight: float, norms: Sequence[float]) -> torch.Tensor:
        """This site's line in an empty table, to be summed over the sites: float64 ``[sites, 1 + guarded]``."""
        table = torch.zeros(sites, 1 + len(norms), dtype=torch.float64)
        table[rank] = torch.tensor([weight, *norms], dtype=torch.float64)
        return table

    @classmethod
    def of(cls, table: torch.Tensor) -> "Contributions":
        """The table of all."""
        lines = table.tolist()
        return cls([line[0] for line in lines], [line[1:] for line in lines])

    @property
    def total_weight(self) -> float:
        """Sum of the weights, rounded once: Python's own ``sum`` differs between its versions."""
        return math.fsum(self.weights)

    @property
    def contributors(self) -> list[int]:
        """Ranks of the sites that are averaged."""
        return [rank for rank, weight in enumerate(self.weights) if weight > 0]

    def outliers(self, threshold: float) -> dict[int, list[float]]:
        """By rank of each site with an update above ``threshold`` times the contributors' median norm: the
        factor for each guarded rule that brings it back to that bound.

        Where most contributors did not move at all, the median is that of those that did.
        """
        contributors = self.contributors
        if threshold <= 0 or len(contributors) < FEWEST_PEERS:
            return {}
        bounds = [threshold * _usual(norms) for norms in zip(*(self.norms[rank] for rank in contributors), strict=True)]
        factors = {
            rank: [
                min(1.0, bound / norm) if norm > 0 else 1.0
                for bound, norm in zip(bounds, self.norms[rank], strict=True)
            ]
            for rank in contributors
        }
        return {rank: each for rank, each in factors.items() if min(each, default=1.0) < 1.0}

    def guard(self, threshold: float, action: Literal["clip", "drop"]) -> dict[int, list[float]]:
        """The outliers, whose weights are gone if they are to be dropped."""
        outliers = self.outliers(threshold)
        if action == "drop":
            for rank in outliers:
                self.weights[rank] = 0.0
        return outliers


def _usual(norms: Sequence[float]) -> float:
    """What most updates are like; infinite where too few moved to tell."""
    usual = median(norms)
    if usual > 0:
        return usual
    moved = [norm for norm in norms if norm > 0]
    return median(moved) if len(moved) >= FEWEST_PEERS else math.inf
