"""Sums over some of the sites of a quorum: those that have one label in common.

Every site finds the members of its own group in the table of statuses, so that all members cut and order their messages
alike. Sites of other groups sum theirs meanwhile; no message passes between groups.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed import Work

from titan_ext.semi_sync.wire.collectives import ByteCollectives, Traffic
from titan_ext.semi_sync.wire.manager import QuorumWire
from titan_ext.semi_sync.wire.reductions import Reduction, RoundFacts, Turns


class SomeSites:
    """What a reduction asks of a ``QuorumWire``, for some sites of the quorum alone.

    Args:
        manager: of all sites of the quorum.
        ranks: of the sites in question, ascending; this site's own is among them.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, manager: QuorumWire, ranks: Sequence[int]) -> None:
        self._manager, self._ranks = manager, list(ranks)
        self._rank = self._ranks.index(manager.participating_rank())

    @property
    def process_group(self) -> Any:
        """Messages to and from them, by their places among ``ranks``."""
        group = self._manager.process_group
        return None if group is None else _SomeRanks(group, self._ranks)

    def num_participants(self) -> int:
        """How many they are."""
        return len(self._ranks)

    def participating_rank(self) -> int:
        """This site's place among them."""
        return self._rank

    def report_error(self, error: Exception) -> None:
        """The whole round fails with one of its groups."""
        self._manager.report_error(error)

    def errored(self) -> object | None:
        """Of the quorum."""
        return self._manager.errored()


class _SomeRanks:
    """Sends and receives of a process group whose ranks are renumbered."""

    def __init__(self, group: Any, ranks: Sequence[int]) -> None:
        self._group, self._ranks = group, ranks

    def getBackendName(self) -> str:
        return self._group.getBackendName()

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work:
        return self._group.send(tensors, self._ranks[dst_rank], tag)

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work:
        return self._group.recv(tensors, self._ranks[src_rank], tag)


class WithinGroup(Reduction):
    """A reduction over the sites of this site's group.

    Args:
        reduction: over all sites, used among those of the group.
        group: key of the label that they have in common.
    """

    def __init__(self, reduction: Reduction, group: str) -> None:
        self._reduction, self._group = reduction, group
        self.cuts_anywhere, self.sums_over_ranks = reduction.cuts_anywhere, reduction.sums_over_ranks

    def wire_bytes(self, numel: int, sites: int) -> int:
        """Among so many sites of a group."""
        return self._reduction.wire_bytes(numel, sites)

    def turns(self, numel: int, sites: int) -> Turns:
        return self._reduction.turns(numel, sites)

    def scratch_elements(self, numel: int, sites: int) -> int:
        return self._reduction.scratch_elements(numel, sites)

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        members = of.members(self._group)
        some: Any = SomeSites(manager, members)
        among = replace(of, weights=[of.weights[rank] for rank in members], labels={})
        self._reduction.reduce(some, values, among, residual)

    def take_traffic(self) -> Traffic:
        return self._reduction.take_traffic()


class FromOneSite(Reduction):
    """What the first of some sites has, given to those of the others that want it: at a newcomer's first round.

    ``weights`` are places in that order, the lowest first; a site that wants the values has a negative one.

    Args:
        bucket_elements: largest message handed to the wire at once.
    """

    cuts_anywhere = False

    def __init__(self, bucket_elements: int) -> None:
        self._bucket_elements = max(1, bucket_elements)

    def wire_bytes(self, numel: int, sites: int) -> int:
        """To one site."""
        return 4 * numel if sites > 1 else 0

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        wire = ByteCollectives(manager, of.now)
        givers = [rank for rank, place in enumerate(of.weights) if place >= 0]
        takers = [rank for rank, place in enumerate(of.weights) if place < 0]
        if not givers or not takers or manager.errored() is not None:
            return
        giver = min(givers, key=lambda rank: of.weights[rank])
        for tag, part in enumerate(values.split(self._bucket_elements)):
            there = part.to(wire.device)
            if wire.rank == giver:
                wire.swap(dict.fromkeys(takers, there), {}, tag).wait()
            elif wire.rank in takers:
                wire.swap({}, {giver: there}, tag).wait()
                if there is not part:
                    part.copy_(there)
        self._traffic += wire.traffic
