"""Key layers: each site has its own, each node of the tree of sites the attentive sum of its constituents'.

Every site keeps the values of the nodes that it belongs to, from the root down, so whoever dies, they are at its neighbours.
Before values travel the sites tell each other sketches; from these each finds its own share at each node, and
multiplies what it sends by that. What comes back is a sum over the sites of a node, the same bits at all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from titan_ext.optim.rounding import copy_randomly
from titan_ext.semi_sync.plan.plan import Apply, SyncRule
from titan_ext.semi_sync.state import attention
from titan_ext.semi_sync.state.group_parameters import ValuesOfGroup
from titan_ext.semi_sync.state.sketches import Sketches
from titan_ext.semi_sync.state.synced_parameters import ValuesWithGlobalCopy
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, Tells, Told
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState

_PIECE = 2**22  # elements that are mixed at a time

SCORES: dict[str, Callable[[float], attention.Score]] = {"cosine": attention.cosine, "fedatt": attention.distance}


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyAttention(Apply):
    """A node's new value is the sum of its constituents' by attention; constituents are pulled to it."""

    plain_sum: ClassVar[bool] = True

    score: Literal["cosine", "fedatt"]
    temperature: float
    step: float
    """Share of the constituents' sum in a node's new value."""
    pull: float
    """Share of the parent's new value in a constituent's."""
    by_block: bool
    """Whether a whole block has one attention, or each of its parameters."""
    sketch: int
    """Numbers of a sketch."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> "KeyLayers":
        """Of the root, which all sites share, or of a federation."""
        return (FederationKeys if rule.group else WorldKeys)(rule, tensors, options)


class KeyLayers(ValuesWithGlobalCopy, Tells):
    """The values of a site's node at one level of the tree. The rules of a plan go from the root down.

    The root tells the sketches of the site's own values, a federation those of its values.
    """

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        assert isinstance(rule.apply, KeyAttention)
        self._settings = rule.apply
        # Of values close to the node's the difference is what a codec should lose a part of.
        self.sends_difference = not rule.wire.codec.lossless
        above = next((each for each in reversed(options.earlier) if isinstance(each, KeyLayers)), None)
        self._parent = above
        self._levels: list[KeyLayers] = [] if above is None else above._levels
        self._levels.append(self)
        unit_of = _block_of if rule.apply.by_block else str
        self._sketches: Sketches = (
            Sketches(tensors, options.site, unit_of, rule.apply.sketch) if above is None else above._sketches
        )
        self.tells = self._sketches.numbers
        self.trained = torch.zeros(())
        """A tensor, so that a checkpoint restores it: 1 once this site has values of its own. The root's counts."""
        self._own_sketch = torch.zeros(0)
        self._telling = torch.zeros(0)
        self._shares = torch.zeros(0)
        """float64 ``[levels, units]``; the root's counts."""

    @property
    def feeds_back(self) -> bool:
        """No: another share each time."""
        return False

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """What this site makes of the node's value; the sketches beside. A collective over the site."""
        self.tensors.read(out)
        local = self._sketches.of(self.tensors.split(out)) if self._parent is None else None
        self._own_sketch = self._sketches.of(self.global_parts)
        self._telling = self._own_sketch if local is None else local
        eta = self._settings.step
        if eta != 1.0:
            # A node mixes its old value with its constituents', and so did they.
            for level in reversed(self._levels[self._levels.index(self) :]):
                out.mul_(eta).add_(level.global_flat, alpha=1 - eta)
        if self.sends_difference:
            torch.sub(self.global_flat, out, out=out)

    def telling(self) -> torch.Tensor:
        """The sketches, one unit after the other."""
        return self._telling.reshape(-1)

    @torch.no_grad()
    def heed(self, contribution: torch.Tensor, told: Told, weight: float) -> None:
        """Give the contribution this site's share in place of its weight."""
        if weight <= 0:
            return
        root, level = self._levels[0], self._levels.index(self)
        if level == 0:
            self._shares = self._find_shares(told)[:, told.rank]
        own = (root._shares[level] / weight).tolist()
        for part, place in zip(self.tensors.split(contribution), self._sketches.places, strict=True):
            part.mul_(own[place])

    def _find_shares(self, told: Told) -> torch.Tensor:
        """The shares of all sites, float64 ``[levels, sites, units]``."""
        units, sites = len(self._sketches.units), len(told.weights)
        sketches = [told.numbers[level.key].view(sites, units, -1) for level in self._levels]
        # The root's value is the same at all sites, so nobody tells it.
        nodes = [self._own_sketch.expand_as(sketches[0]), *sketches[1:]]
        return attention.shares(
            sketches[0],
            nodes,
            [told.labels[level.rule.group] if level.rule.group else [0] * sites for level in self._levels],
            [rank for rank, weight in enumerate(told.weights) if weight > 0],
            score=SCORES[self._settings.score](self._settings.temperature),
            step=self._settings.step,
        )

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Take the sum, pulled to the parent's; from the deepest level the site's own values are pulled, too."""
        if self._settings.step and self.elements:
            self.global_flat.sub_(total) if self.sends_difference else self.global_flat.copy_(total)
        if self._parent is not None:
            for own, above in zip(self.global_flat.split(_PIECE), self._parent.global_flat.split(_PIECE), strict=True):
                _pull(own, above, self._settings.pull)
        if self is self._levels[-1]:
            if of.weight > 0:
                self._levels[0].trained.fill_(1.0)
            for place, (local, part) in enumerate(zip(self.tensors.locals(), self.global_parts, strict=True)):
                mixed = _pull(local.to(part, copy=True), part, self._settings.pull)
                copy_randomly(local, mixed.to(local.device), self.seed(of.step, place))

    def reset_local_to_global(self) -> None:
        """Back to the values of the smallest federation."""
        if self is self._levels[-1]:
            super().reset_local_to_global()

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A member's values; a site without values of its own takes them for all federations that it belongs to."""
        self.load(self.shared_state(), state)
        if self._parent is None and not self.trained:
            for level in self._levels:
                level.global_flat.copy_(self.global_flat)
                level.reset_local_to_global()

    def correct_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """The bits of a member's values; the site's own do not follow from them."""
        self.load(self.shared_state(), state)

    def start_local(self) -> None:
        """A site that comes back keeps its own values; another begins with the smallest federation's."""
        if not self._levels[0].trained:
            self.reset_local_to_global()


class WorldKeys(KeyLayers):
    """Of the root."""

    facts = StateFacts(copies=1, equal_at_all_sites=True)

    def private_state(self) -> NamedState:
        """Whether the site has values of its own; those are the model's parameters."""
        return {name: {"trained": self.trained} for name in self.names}


class FederationKeys(KeyLayers, ValuesOfGroup):
    """Of a federation: equal at the sites of it."""

    facts = StateFacts(copies=1, equal_in_group=True)


def _pull(own: torch.Tensor, parent: torch.Tensor, pull: float) -> torch.Tensor:
    """``(1 - pull) own + pull parent``, in place; each operation is rounded alone, so that every machine has the same bits."""
    return own.mul_(1 - pull).add_(parent * pull)


def _block_of(name: str) -> str:
    """``layers.7`` of ``layers.7.attention.wq.weight``; of what is in no numbered block its module."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1]) or name
