"""Residual key layers: what fits its own federation badly goes to the one that it resembles, one round later.

A site whose layer has little attention in its smallest federation keeps it as it is, before it is pulled, and in the next
round tells everybody whom it resembles most. Of each unit one residual travels in a round, that which fits worst; the
federation takes it as one constituent more. It counts there alone: upwards it goes through its own federation.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.attention import cosine
from titan_ext.semi_sync.state.key_layers import tree_among
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState, Tells, Told
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.wire.nonzero import NonzeroSum

_HALF = 31  # bits of a label's half, which fp64 holds with any other integer


@dataclass(frozen=True, slots=True)
class Residual:
    """One that travels in a round."""

    site: int
    """Rank of the site that it comes from."""
    target: int
    """Number of the label of the federation that it goes to."""
    sketch: torch.Tensor
    """float64 ``[size]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRouting(Apply):
    """Residuals of the levels' rules, which come before this one."""

    plain_sum: ClassVar[bool] = True

    share: float
    """Times an equal share of attention below which a layer is one that fits badly."""
    similarity: float
    """Least cosine with another federation's layer."""
    group: str
    """Key of the label by which the smallest federations are told apart."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> "RoutedKeys":
        """What waits for the next round."""
        return RoutedKeys(rule, tensors, options)


class RoutedKeys(SyncedState, Tells):
    """Sends the values of residuals, zeros otherwise, and at the end for each unit the attention that one has.

    Only the site that a residual comes from sends other numbers than zeros, so all have its bits.
    """

    facts = StateFacts(copies=1)

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        assert isinstance(rule.apply, KeyRouting)
        self._settings, self._site = rule.apply, options.site
        self.reduction = NonzeroSum(rule.wire.bucket_elements, density=0.0)
        tree = tree_among(options.earlier)
        if tree is None:  # bound alone, to ask for its facts
            return
        self._tree = tree
        tree.settles_later = True
        units = len(tree.sketches.units)
        self.plain_numbers = units
        self.tells = 3 * units + tree.sketches.numbers
        self._waiting = tensors.empty().zero_()
        # Of each parameter: the halves of the target's number, and how badly it fits, 0 where nothing waits.
        self._marks = [[torch.zeros((), dtype=torch.float64) for _ in range(3)] for _ in self.names]
        self._telling = torch.zeros(self.tells, dtype=torch.float64)
        self._next: dict[int, tuple[int, float]] = {}
        self._arriving: dict[int, Residual] = {}
        self._guests: set[int] = set()
        """Units for which this site's federation gets one."""
        self._before: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """All that waits, and its sketches beside. A collective over the site."""
        values, numbers = out.split([self.elements, self.plain_numbers])
        values.copy_(self._waiting)
        numbers.zero_()
        sketches = self._tree.sketches
        marks = torch.zeros(len(sketches.units), 3, dtype=torch.float64)
        own = {place: [each.item() for each in of] for place, of in zip(sketches.places, self._marks, strict=True)}
        for theirs in self._site.gather(own):
            for place, mark in theirs.items():
                marks[place] = torch.tensor(mark, dtype=torch.float64)
        waits = bool(marks.any())  # on all ranks of the site, or none
        found = sketches.of(self.tensors.split(self._waiting)) if waits else torch.zeros(sketches.numbers).double()
        self._telling = torch.cat([marks.reshape(-1), found.reshape(-1)])

    def telling(self) -> torch.Tensor:
        """Where residuals go and how badly they fit, and their sketches."""
        return self._telling

    @torch.no_grad()
    def heed(self, contribution: torch.Tensor, told: Told, weight: float) -> None:
        """Leave those that travel, unweighted, with their attention; find those that wait for the next round."""
        values, numbers = contribution.split([self.elements, self.plain_numbers])
        self._arriving = self._admitted(told)
        own_label = told.labels[self._settings.group][told.rank]
        self._guests = {unit for unit, each in self._arriving.items() if each.target == own_label}
        last = self._tree.levels[-1]
        self._before = {
            place: last.global_parts[place].clone()
            for place, unit in enumerate(self._tree.sketches.places)
            if unit in self._guests and self._tree.settings.step != 1.0
        }
        if weight <= 0:
            self._next = {}
            return
        mine = {unit for unit, each in self._arriving.items() if each.site == told.rank}
        for part, unit in zip(self.tensors.split(values), self._tree.sketches.places, strict=True):
            part.mul_(1 / weight) if unit in mine else part.zero_()
        for unit in mine:
            numbers[unit] = self._attention(unit, told)
        self._next = self._badly_placed(told)

    def _admitted(self, told: Told) -> dict[int, Residual]:
        """By unit the residual that travels: of those told the one that fits worst, of equals the first."""
        units = len(self._tree.sketches.units)
        marks, sketches = told.numbers[self.key].split([3 * units, self.tells - 3 * units], dim=1)
        marks, sketches = marks.view(-1, units, 3), sketches.view(len(marks), units, -1)
        found = {}
        for unit in range(units):
            urgency = [marks[site, unit, 2].item() for site in range(len(marks))]
            site = urgency.index(max(urgency))
            if urgency[site] > 0:
                high, low = (int(each) for each in marks[site, unit, :2])
                found[unit] = Residual(site, (high << _HALF) + low, sketches[site, unit])
        return found

    def _attention(self, unit: int, told: Told) -> float:
        """That of a residual of this site at its target, as one constituent more; 0 if nobody is there."""
        residual, labels = self._arriving[unit], told.labels[self._settings.group]
        members = [site for site in told.contributors if labels[site] == residual.target]
        if not members:
            return 0.0
        constituents = torch.stack(
            [*(self._tree.leaves[site, unit] for site in members), residual.sketch - self._tree.origin[unit]]
        )
        node = self._tree.smallest[members[0], unit]
        return torch.softmax(self._tree.score(node[None], constituents[:, None]), dim=0)[-1].item()

    def _badly_placed(self, told: Told) -> dict[int, tuple[int, float]]:
        """By unit of this site's layers the label of the federation that it resembles, and how badly it fits its own."""
        labels, alike = told.labels[self._settings.group], cosine(1.0)
        own = labels[told.rank]
        members = sum(labels[site] == own for site in told.contributors)
        others = {labels[site]: site for site in reversed(told.contributors) if labels[site] != own}
        found = {}
        for unit, share in enumerate(self._tree.shares[-1].tolist()):
            if share * members >= self._settings.share or not others:
                continue
            layer = self._tree.leaves[told.rank, unit][None]
            scores = {
                label: alike(layer, self._tree.smallest[site, unit][None, None]).item()
                for label, site in others.items()
            }
            best = max(scores, key=lambda label: scores[label])
            if scores[best] > self._settings.similarity:
                found[unit] = best, 1 - share * members
        return found

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Take the residuals for this site's federation; keep what waits for the next round; settle the levels."""
        values, numbers = total.split([self.elements, self.plain_numbers])
        step, last = self._tree.settings.step, self._tree.levels[-1]
        shares = numbers.tolist()
        for place, (part, unit) in enumerate(zip(self.tensors.split(values), self._tree.sketches.places, strict=True)):
            if unit in self._guests:
                node, share = last.global_parts[place], shares[unit]
                node.mul_(1 - share).add_(part * (share * step))
                if place in self._before:
                    node.add_(self._before[place] * (share * (1 - step)))
        self._before = {}
        self._keep()
        self._tree.settle(of)

    def _keep(self) -> None:
        """This site's own values of what waits, before they are pulled, and as they may leave it."""
        self._tree.read_own(self._waiting)
        for part, mark, unit in zip(
            self.tensors.split(self._waiting),
            self._marks,
            self._tree.sketches.places,
            strict=True,
        ):
            target, urgency = self._next.get(unit, (0, 0.0))
            for each, value in zip(mark, (target >> _HALF, target & (2**_HALF - 1), urgency), strict=True):
                each.fill_(value)
            if not urgency:
                part.zero_()

    def private_state(self) -> NamedState:
        """What waits, and for whom."""
        parts = self.tensors.split(self._waiting)
        return {
            name: {"waiting": part, "target_high": high, "target_low": low, "urgency": urgency}
            for name, part, (high, low, urgency) in zip(self.names, parts, self._marks, strict=True)
        }
