"""A round from launch to landing, as far as this rank knows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from titan_ext.semi_sync.round.contributions import Contributions
from titan_ext.semi_sync.round.site_status import Position, Standing
from titan_ext.semi_sync.state.synced_state import SyncedRow


@dataclass(slots=True)
class Round:
    """What is agreed, sent and received between a launch and its landing."""

    intent: list[int] | None
    """Indices of the rows this site means to exchange; None while joining."""
    clock: int
    """Inner step of the launch; once the sites have agreed, that of the members."""
    weight: float
    """This site's weight in the mean; 0 contributes nothing."""
    launched: list[int] = field(default_factory=list)
    """What it meant to exchange before it learned that it is behind."""
    tokens: int = 0
    """What this site has trained on since its last commit."""
    pace: int = 0
    """Milliseconds that an inner step takes it."""
    agreed: list[int] = field(default_factory=list)
    """The rows that the members mean to exchange; empty while unknown, and where every site is joining."""
    rows: list[int] = field(default_factory=list)
    """The rows that travel."""
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
    adopted: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """By row: what newcomers take over from the sites that hold it."""
    lost: dict[int, torch.Tensor] = field(default_factory=dict)
    """By row: what the reduction took away from this site's contribution."""
    silent: set[int] = field(default_factory=set)
    """Rows for which this site had nobody to exchange with."""
    sites: int = 0
    seconds_quorum: float = 0.0
    seconds_reduce: float = 0.0
    problem: str | None = None
    """Why the sites agreed on nothing."""
    linger: int = 0
    """Inner steps of the slowest member until a site that has fallen silent counts as dead."""
    meet_at: int = 0
    """Inner step from which sites can agree that were at different points."""
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

    def name(self, rank: int) -> str:
        """Of the site with this rank in the quorum."""
        return (self.table[rank].name if rank < len(self.table) else "") or f"#{rank}"

    def parts(self, rows: Sequence[SyncedRow]) -> list[tuple[int, torch.Tensor]]:
        """Row index and its slice of the buffer, for every row of the round."""
        parts, start = [], 0
        for index in self.rows:
            end = start + rows[index].numel
            parts.append((index, self.buffer[start:end]))
            start = end
        return parts

    # -- a reduced round in a checkpoint -----------------------------------------------------------

    def describe(self, rows: Sequence[SyncedRow]) -> dict[str, Any]:
        """Without its tensors, as JSON values."""
        return {
            "rows": [rows[index].row.key for index in self.rows],
            "clock": self.clock,
            "weight": self.weight,
            "tokens": self.tokens,
            "sites": self.sites,
            "weights": self.contributions.weights,
            "table": [(site.name, site.tokens) for site in self.table],
        }

    @classmethod
    def restored(
        cls, description: Mapping[str, Any], state: Mapping[str, Any], rows: Sequence[SyncedRow], device: torch.device
    ) -> "Round":
        """The round that ``describe`` and ``flight_state`` told of."""
        keys = [row.row.key for row in rows]
        indices = [keys.index(key) for key in description["rows"]]
        clock = description["clock"]
        round_ = cls(
            intent=indices,
            clock=clock,
            weight=description["weight"],
            tokens=description["tokens"],
            rows=indices,
            sites=description["sites"],
            buffer=torch.empty(sum(rows[index].numel for index in indices), device=device),
            contributions=Contributions(description["weights"], [[] for _ in description["weights"]]),
            table=[
                Standing(name=name, tokens=tokens, fingerprint=0, clock=clock, rows=indices)
                for name, tokens in description["table"]
            ],
        )
        for index, part in round_.parts(rows):
            rows[index].fill_from_parts(part, state[keys[index]])
        return round_


def flight_state(round_: Round | None, rows: Sequence[SyncedRow]) -> dict[str, dict[str, torch.Tensor]]:
    """Reduced values of every row that can be in flight, zeros where nothing is, for a checkpoint.

    It is loaded into the tensors of a fresh object, so the keys may not depend on the moment.
    """
    parts = dict(round_.parts(rows)) if round_ is not None else {}
    return {
        row.row.key: row.named_parts(parts.get(index, torch.zeros(row.numel, device=row.device)))
        for index, row in enumerate(rows)
        if row.row.delay
    }
