"""Key layers: each site has its own, each node of the tree of sites the attentive sum of its constituents'.

Every site keeps the values of the nodes that it belongs to, from the root down, so whoever dies, they are at its neighbours.
Before values travel the sites tell each other sketches; from these each finds its own share at each node, and
multiplies what it sends by that. What comes back is a sum over the sites of a node, the same bits at all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from titan_ext.optim.rounding import copy_randomly
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state import attention
from titan_ext.semi_sync.state.group_parameters import ValuesOfGroup
from titan_ext.semi_sync.state.privacy import Noise, Noised
from titan_ext.semi_sync.state.sketches import Sketches
from titan_ext.semi_sync.state.synced_parameters import ValuesWithGlobalCopy
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState, Tells, Told
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
    from_root: bool = False
    """Whether layers are compared by how they differ from the root's, and not as they are."""
    noise: Noise | None = None
    """How what leaves a site is clipped and noised; None: not at all."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> "KeyLayers":
        """Of the root, which all sites share, or of a federation."""
        return (FederationKeys if rule.group else WorldKeys)(rule, tensors, options)


class KeyTree:
    """The key layers of all levels of the tree as one site holds them, the root's first.

    Args:
        settings: of all levels.
        sketches: of the site's key layers.
    """

    def __init__(self, settings: KeyAttention, sketches: Sketches) -> None:
        self.settings, self.sketches = settings, sketches
        self.levels: list[KeyLayers] = []
        self.score = SCORES[settings.score](settings.temperature)
        self.settles_later = False
        """Whether something is still to be applied after the levels' sums, which then calls ``settle``."""
        self.trained = torch.zeros(())
        """A tensor, so that a checkpoint restores it: 1 once this site has values of its own."""
        self.shares = torch.zeros(0)
        """Of this site in the round under way, float64 ``[levels, units]``."""
        self.origin = torch.zeros(0)
        """Sketches of what values are compared from in the round under way, float64 ``[units, size]``: the root's, or 0."""
        self.leaves = torch.zeros(0)
        """Likewise of the sites' own values, from there, ``[sites, units, size]``."""
        self.noised: Noised | None = None
        self._released: torch.Tensor | None = None
        self.smallest = torch.zeros(0)
        """Likewise of the smallest federation of each site, before the round."""

    @torch.no_grad()
    def release(self) -> None:
        """At the beginning of a round: make new values of the site's own that may leave it. A collective over the site.

        Their distance to the smallest federation's is clipped and noised; sketches, sums and residuals are all of these.
        """
        last = self.levels[-1]
        if self.noised is not None:
            self._released = last.tensors.empty()
            last.tensors.read(self._released)
            self._released.sub_(last.global_flat)
            self.noised.noise_(self._released)
            self._released.add_(last.global_flat)

    @torch.no_grad()
    def read_own(self, out: torch.Tensor) -> None:
        """The site's own values as they may leave it, into ``out`` (fp32 ``[elements]``)."""
        if self._released is not None:
            out.copy_(self._released)
        else:
            self.levels[-1].tensors.read(out)

    def hear(self, told: Told, root: torch.Tensor) -> None:
        """Find the shares of the round.

        Args:
            told: by all sites.
            root: sketches of the root's value, float64 ``[units, size]``.
        """
        units, sites = len(self.sketches.units), len(told.weights)
        # Sketches add up as values do, and so do their differences.
        self.origin = root if self.settings.from_root else torch.zeros_like(root)
        sketches = [told.numbers[level.key].view(sites, units, -1) - self.origin for level in self.levels]
        # The root's value is the same at all sites, so nobody tells it.
        nodes = [(root - self.origin).expand_as(sketches[0]), *sketches[1:]]
        found = attention.shares(
            sketches[0],
            nodes,
            [told.labels[level.rule.group] if level.rule.group else [0] * sites for level in self.levels],
            told.contributors,
            score=self.score,
            step=self.settings.step,
        )
        self.shares, self.leaves, self.smallest = found[:, told.rank], sketches[0], nodes[-1]

    @torch.no_grad()
    def settle(self, of: AppliedRound) -> None:
        """Pull each level to the one above, from the root down, and the site's own values to the smallest federation's."""
        pull, last = self.settings.pull, self.levels[-1]
        for above, level in zip(self.levels, self.levels[1:], strict=False):
            for own, parent in zip(level.global_flat.split(_PIECE), above.global_flat.split(_PIECE), strict=True):
                _pull(own, parent, pull)
        if of.weight > 0:
            self.trained.fill_(1.0)
        self._released = None
        for place, (local, part) in enumerate(zip(last.tensors.locals(), last.global_parts, strict=True)):
            mixed = _pull(local.to(part, copy=True), part, pull)
            copy_randomly(local, mixed.to(local.device), last.seed(of.step, place))


class KeyLayers(ValuesWithGlobalCopy, Tells):
    """The values of a site's node at one level of the tree. The rules of a plan go from the root down.

    The root tells the sketches of the site's own values, a federation those of its values.
    """

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        assert isinstance(rule.apply, KeyAttention)
        self._step = rule.apply.step
        # Of values close to the node's the difference is what a codec should lose a part of.
        self.sends_difference = not rule.wire.codec.lossless
        self.tree: KeyTree = tree_among(options.earlier) or KeyTree(
            rule.apply, Sketches(tensors, options.site, _block_of if rule.apply.by_block else str, rule.apply.sketch)
        )
        self.tree.levels.append(self)
        self._is_root = len(self.tree.levels) == 1
        if self._is_root and rule.apply.noise is not None:
            self.tree.noised = Noised(rule.apply.noise, tensors, options.site)
        self.tells = self.tree.sketches.numbers
        self._own_sketch = torch.zeros(0)
        self._telling = torch.zeros(0)

    @property
    def feeds_back(self) -> bool:
        """No: another share each time."""
        return False

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """What this site makes of the node's value; the sketches beside. A collective over the site."""
        if self._is_root:
            self.tree.release()
        self.tree.read_own(out)
        local = self.tree.sketches.of(self.tensors.split(out)) if self._is_root else None
        self._own_sketch = self.tree.sketches.of(self.global_parts)
        self._telling = self._own_sketch if local is None else local
        if self._step != 1.0:
            # A node mixes its old value with its constituents', and so did they.
            for level in reversed(self.tree.levels[self.tree.levels.index(self) :]):
                out.mul_(self._step).add_(level.global_flat, alpha=1 - self._step)
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
        if self._is_root:
            self.tree.hear(told, self._own_sketch)
        own = (self.tree.shares[self.tree.levels.index(self)] / weight).tolist()
        for part, place in zip(self.tensors.split(contribution), self.tree.sketches.places, strict=True):
            part.mul_(own[place])

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Take the sum; after the last of them all is settled."""
        if self._step and self.elements:
            self.global_flat.sub_(total) if self.sends_difference else self.global_flat.copy_(total)
        if self is self.tree.levels[-1] and not self.tree.settles_later:
            self.tree.settle(of)

    def reset_local_to_global(self) -> None:
        """Back to the values of the smallest federation."""
        if self is self.tree.levels[-1]:
            super().reset_local_to_global()

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A member's values; a site without values of its own takes them for all federations that it belongs to."""
        self.load(self.shared_state(), state)
        if self._is_root and not self.tree.trained:
            for level in self.tree.levels:
                level.global_flat.copy_(self.global_flat)
                level.reset_local_to_global()

    def correct_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """The bits of a member's values; the site's own do not follow from them."""
        self.load(self.shared_state(), state)

    def start_local(self) -> None:
        """A site that comes back keeps its own values; another begins with the smallest federation's."""
        if not self.tree.trained:
            self.reset_local_to_global()


def tree_among(states: Sequence[SyncedState]) -> KeyTree | None:
    """The tree whose levels are among the states."""
    return next((each.tree for each in states if isinstance(each, KeyLayers)), None)


class WorldKeys(KeyLayers):
    """Of the root."""

    facts = StateFacts(copies=1, equal_at_all_sites=True)

    def private_state(self) -> NamedState:
        """Whether the site has values of its own; those are the model's parameters."""
        return {name: {"trained": self.tree.trained} for name in self.names}


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
