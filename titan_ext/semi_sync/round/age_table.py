"""The sites' step counts of the parameters whose moments a round averages."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from titan_ext.semi_sync.state.moment_ages import UNCOUNTED, Ages
from titan_ext.semi_sync.state.synced_state import SyncedState


class AgeTable:
    """The counts of the parameters whose moments a round averages, as columns of a table with a line for each site.

    Making it is a collective over the site.

    Args:
        states: of the round, bound to this rank.
        gather: a value of every rank of the site, a collective.
    """

    def __init__(self, states: Iterable[SyncedState], gather: Callable[[Any], list[Any]]) -> None:
        bound = [(state.rule.state, state.tensors.view, state.names) for state in states if state.averages_state]
        own = {name: view.steps(name) for _, view, names in bound for name in names}
        by_rank = gather(own) if bound else []
        self._counts = {name: count for each in by_rank for name, count in each.items()}
        self._names = sorted(self._counts)
        covered: dict[str, set[str | None]] = {}
        for state, view, names in bound:
            for name in names:
                covered.setdefault(name, set()).add(view.key(state, name))
        self._whole = frozenset(
            name for _, view, names in bound for name in names if covered[name] >= view.moments(name).keys()
        )

    def columns(self, rank: int, sites: int) -> torch.Tensor:
        """This site's line in an empty table, to be summed over the sites: float64 ``[sites, parameters]``."""
        table = torch.zeros(sites, len(self._names), dtype=torch.float64)
        counts = (self._counts[name] for name in self._names)
        table[rank] = torch.tensor([UNCOUNTED if each is None else each for each in counts], dtype=torch.float64)
        return table

    def ages(self, table: torch.Tensor, weights: Sequence[float]) -> Ages:
        """What the table of all sites says of those with a weight above 0."""
        contributors = [rank for rank, weight in enumerate(weights) if weight > 0]
        lines = table[contributors].to("cpu", torch.int64).T.tolist()
        return Ages(dict(zip(self._names, lines, strict=True)), [weights[rank] for rank in contributors], self._whole)
