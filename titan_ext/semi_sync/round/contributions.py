"""What the sites put into a round, and what comes back. Equal tables of contributions lead to equal means."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import torch

from titan_ext.semi_sync.plan.plan import OutlierGuard
from titan_ext.semi_sync.plan.weighting import NO_STANDING, SiteWeighting, Standing
from titan_ext.semi_sync.state.moment_ages import UNCOUNTED, Ages
from titan_ext.semi_sync.state.synced_state import AppliedRound, Guarded, SyncedState, Tells, Told

_TOLD = 5  # a site's weight, what it tells of its standing, and its staleness

FEWEST_PEERS = 3
"""Of two updates none is the outlier."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a site puts into a round."""

    weight: float
    """0 contributes nothing; the buffer is zero then."""
    buffer: torch.Tensor
    """fp32: the messages of the rules one after the other, multiplied by the weight. The reduction overwrites it."""
    parts: dict[int, torch.Tensor]
    """By rule its stretch of the buffer."""
    norms: list[float]
    """Norm of this site's update for each guarded rule."""
    is_finite: bool = True
    """Whether what the site meant to contribute was; a NaN or an infinity is left out."""
    standing: Standing = NO_STANDING
    """How the model that the site received serves it."""
    staleness: int = 0
    """Commits of the same part of the model that have gone by since the work in it began, but for the last one."""


@dataclass(slots=True)
class Contributions:
    """A round's contributions, by the rank of the site in the quorum."""

    weights: list[float]
    """0 for a site that contributes nothing."""
    norms: list[list[float]]
    """``[site][guarded rule]``: Euclidean norm of its update."""
    standings: list[Standing] = field(default_factory=list)
    """How the model serves each site."""
    staleness: list[int] = field(default_factory=list)
    """Of each site's contribution."""
    step: float = 1.0
    """What the mean update is multiplied by."""
    remembered: dict[int, float] = field(default_factory=dict)
    """By rank what the site is to tell of its share in the next round."""
    rank: int = 0
    """Of this site."""
    labels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By group key a number of each site's label."""

    @property
    def total_weight(self) -> float:
        """Sum of the weights, rounded once: Python's own ``sum`` differs between its versions."""
        return math.fsum(self.weights)

    @property
    def contributors(self) -> list[int]:
        """Ranks of the sites that are averaged."""
        return [rank for rank, weight in enumerate(self.weights) if weight > 0]

    def within(self, group: str) -> "Contributions":
        """Those of the sites with this site's label; of all sites without a group."""
        if not group:
            return self
        labels = self.labels[group]
        own = [
            weight if label == labels[self.rank] else 0.0 for weight, label in zip(self.weights, labels, strict=True)
        ]
        return replace(self, weights=own)

    def outliers(self, threshold: float, groups: Sequence[str] = ()) -> dict[int, list[float]]:
        """By rank of each site with an update above ``threshold`` times the median norm of its peers: the
        factor for each guarded rule that brings it back to that bound.

        Where most contributors did not move at all, the median is that of those that did.

        Args:
            threshold: 0 lets everything pass.
            groups: of each guarded rule, whose sites are compared with those of their own label; by default all are.
        """
        if threshold <= 0:
            return {}
        contributors = self.contributors
        factors = {rank: [1.0] * len(self.norms[rank]) for rank in contributors}
        for column in range(len(self.norms[contributors[0]]) if contributors else 0):
            for peers in self._peers(contributors, groups[column] if groups else ""):
                bound = threshold * _usual([self.norms[rank][column] for rank in peers])
                for rank in peers if len(peers) >= FEWEST_PEERS else ():
                    norm = self.norms[rank][column]
                    factors[rank][column] = min(1.0, bound / norm) if norm > 0 else 1.0
        return {rank: each for rank, each in factors.items() if min(each, default=1.0) < 1.0}

    def _peers(self, ranks: Sequence[int], group: str) -> list[list[int]]:
        if not group:
            return [list(ranks)]
        by_label: dict[int, list[int]] = {}
        for rank in ranks:
            by_label.setdefault(self.labels[group][rank], []).append(rank)
        return list(by_label.values())

    def weigh(self, weighting: SiteWeighting) -> dict[int, float]:
        """Multiply the contributors' weights by what the policy gives each, which is returned by rank, if it does."""
        ranks = self.contributors
        standings = [
            replace(self.standings[rank], norm=math.sqrt(math.fsum(norm * norm for norm in self.norms[rank])))
            for rank in ranks
        ]
        shares = weighting.shares(standings) if ranks else None
        if shares is None:
            return {}
        factors = dict(zip(ranks, shares.factors, strict=True))
        for rank, factor in factors.items():
            self.weights[rank] *= factor
        self.step, self.remembered = shares.step, dict(zip(ranks, shares.remembered, strict=False))
        return factors

    def guard(
        self, threshold: float, action: Literal["clip", "drop"], groups: Sequence[str] = ()
    ) -> dict[int, list[float]]:
        """The outliers, whose weights are gone if they are to be dropped."""
        outliers = self.outliers(threshold, groups)
        if action == "drop":
            for rank in outliers:
                self.weights[rank] = 0.0
        return outliers


class ContributionTable:
    """A line for each site: its weight and standing, the norms of its guarded updates, how many steps its moments
    stand for, and what some states have to tell.

    Making it is a collective over the site.

    Args:
        own: this site's contribution.
        states: of the round, bound to this rank.
        gather: a value of every rank of the site, a collective.
    """

    def __init__(self, own: Contribution, states: Sequence[SyncedState], gather: Callable[[Any], list[Any]]) -> None:
        self._own = own
        self._groups = [state.rule.group for state in states if isinstance(state, Guarded)] if own.norms else []
        bound = [(state.rule.state, state.tensors.view, state.names) for state in states if state.averages_state]
        steps = {name: view.steps(name) for _, view, names in bound for name in names}
        by_rank = gather(steps) if bound else []
        self._counts = {name: count for each in by_rank for name, count in each.items()}
        self._names = sorted(self._counts)
        self._tellers = {state.key: state for state in states if isinstance(state, Tells)}
        covered: dict[str, set[str | None]] = {}
        for state, view, names in bound:
            for name in names:
                covered.setdefault(name, set()).add(view.key(state, name))
        self._whole = frozenset(
            name for _, view, names in bound for name in names if covered[name] >= view.moments(name).keys()
        )

    def line(self, rank: int, sites: int) -> torch.Tensor:
        """This site's line in an empty table, to be summed over the sites.

        float64 ``[sites, 5 + guarded + parameters + told]``.
        """
        counts = [self._counts[name] for name in self._names]
        ages = [UNCOUNTED if each is None else each for each in counts]
        standing = self._own.standing
        told = [self._own.weight, standing.loss, standing.merit, standing.share, self._own.staleness]
        line = torch.tensor([*told, *self._own.norms, *ages], dtype=torch.float64)
        tellings = [each.telling() for each in self._tellers.values()] if self._own.weight > 0 else []
        table = torch.zeros(sites, len(line) + sum(each.tells for each in self._tellers.values()), dtype=torch.float64)
        own = torch.cat([line, *tellings])
        table[rank, : len(own)] = own
        return table

    def read(
        self, table: torch.Tensor, guard: OutlierGuard, rank: int = 0, labels: Mapping[str, Sequence[int]] | None = None
    ) -> tuple[Contributions, dict[int, list[float]], Ages]:
        """What the table of all sites says: the contributions, the outliers among them, and the sites' steps.

        Args:
            table: the sum of all sites' lines.
            guard: what becomes of outliers.
            rank: of this site.
            labels: by group key a number of each site's label.
        """
        first_age = _TOLD + len(self._own.norms)
        lines = table[:, : first_age + len(self._names)].tolist()
        contributions = Contributions(
            [line[0] for line in lines],
            [line[_TOLD:first_age] for line in lines],
            [Standing(loss=loss, merit=merit, share=share) for _, loss, merit, share, *_ in lines],
            [int(line[_TOLD - 1]) for line in lines],
            rank=rank,
            labels=labels or {},
        )
        outliers = contributions.guard(guard.threshold, guard.action, self._groups)
        ages = {name: [int(line[place]) for line in lines] for place, name in enumerate(self._names, start=first_age)}
        return contributions, outliers, Ages(ages, contributions.weights, self._whole)

    def told(self, table: torch.Tensor, of: Contributions) -> Told:
        """What the sites have told each other beside, of the contributions that count in the end."""
        sizes = [state.tells for state in self._tellers.values()]
        parts = table.cpu()[:, table.shape[1] - sum(sizes) :].split(sizes, dim=1) if sizes else ()
        return Told(dict(zip(self._tellers, parts, strict=True)), of.weights, of.labels, of.rank)


@dataclass(frozen=True, slots=True)
class Sum:
    """What came back."""

    parts: dict[int, torch.Tensor]
    """By rule the weighted sum of its messages over the sites, fp32. The same memory as the contribution's."""
    weight: float
    """This site's own weight in it."""
    own_is_finite: bool
    """Whether what this site meant to contribute was."""
    contributions: Contributions
    """What all sites put in."""
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)
    """By rule: what the reduction took away from this site's contribution, as if that had weight 1."""
    remembered: float | None = None
    """What this site is to tell of its share in the next round, where the policy of the weights wants that."""
    in_parts: tuple[torch.Tensor, ...] = ()
    """Stretches of which this rank has summed its part alone, as long as its like at the site have not shared theirs."""
    ages: Ages | None = None
    """How many steps the moments stand for that the sites put in."""
    seconds: float = 0.0
    """Of the reduction."""

    def of_group(self, group: str, step: int) -> AppliedRound:
        """What a rule that the sites of one label share learns of the round; without a group all sites share it."""
        within = self.contributions.within(group)
        ages = self.ages and self.ages.weighted(within.weights)
        return AppliedRound(
            step=step,
            weight=self.weight,
            total_weight=within.total_weight,
            ages=ages,
            update_factor=self.contributions.step,
        )


def new_buffer(
    rules: Sequence[int], states: Sequence[SyncedState], device: torch.device
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """An fp32 buffer for the messages of the rules, one after the other, and by rule its stretch of it."""
    sizes = [states[index].numel for index in rules]
    buffer = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    return buffer, dict(zip(rules, buffer.split(sizes), strict=True)) if sizes else {}


def is_finite(values: torch.Tensor) -> bool:
    """Whether all of them are numbers."""
    if not values.numel() or torch.isfinite(values.sum()):  # half the time; it may overflow where all are
        return True
    low, high = torch.aminmax(values)  # NaN in, NaN out; and no copy
    return bool(torch.isfinite(low) & torch.isfinite(high))


def mean_is_finite(total: torch.Tensor, weight: float) -> bool:
    """Whether a sum divided by its weight is, with the fp32 in which it will be divided; a weight of 0 takes part in
    nothing."""
    if not total.numel() or weight <= 0:
        return True
    low, high = (each / weight for each in torch.aminmax(total))
    return bool(torch.isfinite(low) & torch.isfinite(high))


class ErrorFeedback:
    """What reductions have taken away so far; it is this site's alone.

    Args:
        states: the plan's rules bound to this rank.
        device: where the memory lies.
    """

    def __init__(self, states: Sequence[SyncedState], device: torch.device) -> None:
        self._states = states
        self._residuals = {
            index: torch.zeros(state.numel, device=device) for index, state in enumerate(states) if state.feeds_back
        }

    def takes(self, index: int) -> bool:
        """Whether anybody wants to know what a rule's reduction takes away."""
        return index in self._residuals or self._states[index].takes_residual

    def add(self, index: int, contribution: torch.Tensor) -> None:
        """Put what a rule is owed into its contribution (fp32 ``[numel]``, not yet multiplied by its weight)."""
        if index in self._residuals:
            contribution.add_(self._residuals[index])

    def settle(self, committed: Sum) -> None:
        """Call when a round is committed: what it took away is owed by the next one."""
        for index, residual in committed.residuals.items():
            if not self._states[index].takes_residual:
                self._residuals[index] = self._owed(index, committed)
            elif committed.weight > 0:
                self._states[index].take_residual(residual)

    def checkpoint_state(self, in_flight: Sum | None) -> dict[str, dict[str, torch.Tensor]]:
        """By rule and parameter, with global shapes.

        Args:
            in_flight: of a round that has not been applied; what it took away counts as settled.
        """
        return {
            self._states[index].key: self._states[index].named_message(
                flat if in_flight is None else self._owed(index, in_flight)
            )
            for index, flat in self._residuals.items()
        }

    def _owed(self, index: int, of: Sum) -> torch.Tensor:
        """What a rule is owed after a round; one to which this site gave nothing has paid nothing either."""
        residual = of.residuals.get(index)
        if residual is None:
            return self._residuals[index]
        return residual if of.weight > 0 else self._residuals[index] + residual

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore what ``checkpoint_state`` returned."""
        for index, flat in self._residuals.items():
            self._states[index].fill_message(flat, state[self._states[index].key])


def _usual(norms: Sequence[float]) -> float:
    """What most updates are like; infinite where too few moved to tell."""
    usual = median(norms)
    if usual > 0:
        return usual
    moved = [norm for norm in norms if norm > 0]
    return median(moved) if len(moved) >= FEWEST_PEERS else math.inf
