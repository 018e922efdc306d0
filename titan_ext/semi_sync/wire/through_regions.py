"""Sums over a tree of sites: each region sums its own first, and one site of it speaks for all.

From the deepest level up, the sites of a region send what they have to its first site in the quorum, which adds it up in
fp32. The speakers of the outermost regions reduce their sums among themselves, through a codec or not, and each sends the
result back down. So between regions travels what one site sends, whatever the number of its neighbours, and all sites take
the same bits. Who speaks follows from the quorum: if a speaker dies the round fails, and in the next quorum another is first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from titan_ext.semi_sync.plan.regions import LEVELS, level_labels
from titan_ext.semi_sync.wire.collectives import ByteCollectives, Traffic
from titan_ext.semi_sync.wire.manager import QuorumWire
from titan_ext.semi_sync.wire.reductions import Reduction, RoundFacts, Turns
from titan_ext.semi_sync.wire.some_sites import SomeSites


@dataclass(frozen=True, slots=True)
class Tree:
    """Who sends to whom in a quorum."""

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    """For each level, the deepest first, the groups of ranks that meet there; the first of a group speaks for it."""
    speakers: tuple[int, ...]
    """Of the outermost regions."""

    @classmethod
    def of(cls, labels: Mapping[str, Sequence[Any]], sites: int) -> "Tree":
        """The tree of the sites of a quorum, from their labels of ``LEVELS``."""
        active, levels = list(range(sites)), []
        for level in LEVELS:
            groups: dict[Any, list[int]] = {}
            for rank in active:
                groups.setdefault(labels[level][rank], []).append(rank)
            levels.append(tuple(tuple(each) for each in groups.values() if len(each) > 1))
            active = sorted(each[0] for each in groups.values())
        return cls(tuple(levels), tuple(active))

    def group_of(self, rank: int, level: int) -> tuple[int, ...]:
        """The group in which a site meets others at a level; empty if in none."""
        return next((each for each in self.groups[level] if rank in each), ())

    def messages_within(self, rank: int) -> int:
        """Copies of the values that a site sends inside its regions."""
        found = 0
        for groups in self.groups:
            own = next((each for each in groups if rank in each), (rank,))
            found += len(own) - 1 if rank == own[0] else 1
        return found


class ThroughRegions(Reduction):
    """The sum over all sites, region by region.

    Args:
        reduction: between the speakers of the outermost regions.
        bucket_elements: largest message inside a region.
    """

    def __init__(self, reduction: Reduction, bucket_elements: int) -> None:
        self._reduction, self._bucket_elements = reduction, max(1, bucket_elements)
        self.cuts_anywhere = reduction.cuts_anywhere

    def wire_bytes(self, numel: int, sites: int) -> int:
        """As if each site were a region of its own; ``of_sites`` knows better."""
        return self._reduction.wire_bytes(numel, sites)

    def turns(self, numel: int, sites: int) -> Turns:
        found = self._reduction.turns(numel, sites)
        return replace(found, before=found.before + 2)

    def scratch_elements(self, numel: int, sites: int) -> int:
        return min(numel, self._bucket_elements) + self._reduction.scratch_elements(numel, sites)

    def of_sites(self, regions: Sequence[str], rank: int) -> Reduction:
        """The same for costs, where it is known which sites there are.

        Args:
            regions: path of each site, in the order of a quorum.
            rank: of the site whose bytes count.
        """
        return _Among(self, self._reduction, tree_of(regions), rank)

    def take_traffic(self) -> Traffic:
        return super().take_traffic() + self._reduction.take_traffic()

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        if residual is not None:
            residual.zero_()
        wire = ByteCollectives(manager, of.now)
        tree = Tree.of(of.labels, wire.sites)
        levels = range(len(LEVELS))
        for level in levels:
            self._up(wire, tree.group_of(wire.rank, level), values)
        if wire.rank in tree.speakers:
            some: Any = SomeSites(manager, tree.speakers)
            # What the speakers hold are sums of sites, multiplied by their weights already.
            among = replace(of, weights=[1.0] * len(tree.speakers), labels={})
            self._reduction.reduce(some, values, among, residual)
        for level in reversed(levels):
            self._down(wire, tree.group_of(wire.rank, level), values)
        self._traffic += wire.traffic

    def _up(self, wire: ByteCollectives, group: Sequence[int], values: torch.Tensor) -> None:
        """Values of a region to its first site, which adds them in the order of the sites."""
        for place, part in enumerate(values.split(self._bucket_elements) if group else ()):
            own = part.to(wire.device)
            if wire.rank != group[0]:
                wire.swap({group[0]: own}, {}, place).wait()
                continue
            received = {rank: torch.empty_like(own) for rank in group[1:]}
            wire.swap({}, received, place).wait()
            for rank in group[1:]:
                part.add_(received[rank].to(part.device))

    def _down(self, wire: ByteCollectives, group: Sequence[int], values: torch.Tensor) -> None:
        """The result from the first site of a region to the others."""
        for place, part in enumerate(values.split(self._bucket_elements) if group else ()):
            there = part.to(wire.device)
            if wire.rank == group[0]:
                wire.swap(dict.fromkeys(group[1:], there), {}, place).wait()
            else:
                wire.swap({}, {group[0]: there}, place).wait()
                if there is not part:
                    part.copy_(there)


class _Among(Reduction):
    """What a site of a known tree sends."""

    def __init__(self, whole: ThroughRegions, reduction: Reduction, tree: Tree, rank: int) -> None:
        self.cuts_anywhere = whole.cuts_anywhere
        self._whole, self._reduction, self._tree, self._rank = whole, reduction, tree, rank

    def wire_bytes(self, numel: int, sites: int) -> int:
        across = self._reduction.wire_bytes(numel, len(self._tree.speakers))
        within = 4 * numel * self._tree.messages_within(self._rank)
        return within + (across if self._rank in self._tree.speakers else 0)

    def turns(self, numel: int, sites: int) -> Turns:
        return self._whole.turns(numel, len(self._tree.speakers))

    def scratch_elements(self, numel: int, sites: int) -> int:
        return self._whole.scratch_elements(numel, len(self._tree.speakers))

    def reduce(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError


def tree_of(regions: Sequence[str]) -> Tree:
    """The tree of sites of these regions."""
    labels = [level_labels(path) for path in regions]
    return Tree.of({level: [each[level] for each in labels] for level in LEVELS}, len(regions))
