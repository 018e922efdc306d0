"""A round from launch to landing, as far as this rank knows it."""

from dataclasses import dataclass, field

import torch

from titan_ext.semi_sync.contributions import Contributions
from titan_ext.semi_sync.standing import Position, Standing


@dataclass(slots=True)
class Round:
    """What is agreed, sent and received between a launch and its landing."""

    intent: list[int] | None
    """Indices of the rows this site means to exchange; None while joining."""
    clock: int
    """Inner step of the launch."""
    weight: float
    """This site's weight in the mean; 0 contributes nothing."""
    launched: list[int] = field(default_factory=list)
    """What it meant to exchange before it learned that it is behind."""
    tokens: int = 0
    """What this site has trained on since its last commit."""
    rows: list[int] = field(default_factory=list)
    """The rows all sites agreed on."""
    buffer: torch.Tensor | None = None
    """fp32: the rows one after the other."""
    norms: list[float] = field(default_factory=list)
    """Norm of this site's update for each guarded row."""
    contributions: Contributions | None = None
    """What all sites put in; known once the reduction has begun."""
    table: list[Standing] = field(default_factory=list)
    """The standings of the sites of the quorum."""
    opening: tuple[int, Position] | None = None
    """Run and position from which sites go on that have all just joined."""
    lost: dict[int, torch.Tensor] = field(default_factory=dict)
    """By row: what the reduction took away from this site's contribution."""
    silent: set[int] = field(default_factory=set)
    """Rows for which this site had nobody to exchange with."""
    sites: int = 0
    seconds_quorum: float = 0.0
    seconds_reduce: float = 0.0
    problem: str | None = None
    """Why the sites agreed on nothing."""
    refused: bool = False
    """The problem is this site's own."""
    diverged: bool = False
    """This site's shared state is not that of the others."""

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the sites that contributed."""
        return self.contributions.total_weight if self.contributions is not None else 0.0

    @property
    def contributors(self) -> list[int]:
        """Ranks of the sites that contributed."""
        return self.contributions.contributors if self.contributions is not None else []
