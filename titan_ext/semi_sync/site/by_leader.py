"""One rank of a site exchanges whole tensors for all of them: for sites of different layout."""

from collections.abc import Sequence

import torch

from titan_ext.semi_sync.site.leader_manager import LeaderManager
from titan_ext.semi_sync.site.shards import SiteShards
from titan_ext.semi_sync.state.synced_state import SyncedState
from titan_ext.semi_sync.wire.manager import QuorumWire, ReplicaManager
from titan_ext.semi_sync.wire.reductions import Reduction, RoundFacts


class ByLeader:
    """Tensors are made whole on the leader some at a time, exchanged, and cut up again.

    Args:
        states: the plan's rules bound to this rank.
        shards: the shards of the site's parameters.
        bucket_elements: about how much is whole at once, more if one tensor is larger.

    Raises:
        ValueError: a state or its aggregation is not elementwise, so that sites of different layout cannot exchange it.
    """

    name = "leader"

    def __init__(self, states: Sequence[SyncedState], shards: SiteShards, bucket_elements: int) -> None:
        for state in states:
            if not (state.facts.elementwise and state.rule.wire.aggregation.elementwise):
                kind = state if not state.facts.elementwise else state.rule.wire.aggregation
                raise ValueError(
                    f'pairing = "leader": {type(kind).__name__} works on a rank\'s own shards; '
                    'give all sites one parallel layout, or set semi_sync.pairing = "rank"'
                )
        self._shards = shards
        self._bucket_elements = max(1, bucket_elements)
        held = shards.gather([state.names for state in states])
        self._names = [sorted({name for names in held for name in names[index]}) for index in range(len(states))]
        forms = shards.gather([bool(state.names) and state.sends_difference for state in states])
        self._sends_difference = [any(of_ranks) for of_ranks in zip(*forms, strict=True)]
        self._index = {id(state): index for index, state in enumerate(states)}
        self._states = states

    def fingerprint(self, states: Sequence[SyncedState]) -> dict[str, str]:
        """What sites that pair so must have in common beside their settings: every whole tensor."""
        shapes = [
            (state.key, name, state.agreed_shape(self._shards.shape(name)), sends_difference)
            for state, names, sends_difference in zip(states, self._names, self._sends_difference, strict=True)
            for name in names
        ]
        return {"model": repr(shapes), "pairing": self.name}

    def manager_of_all_ranks(self, manager: ReplicaManager | None) -> ReplicaManager:
        """The manager of every rank of the site, from the leader's."""
        return LeaderManager(manager, self._shards)

    def speaks_for(self, name: str) -> bool:
        """Whether this rank's shard of a parameter counts in the site's checksum: of equal shards one does."""
        return self._shards.sends(self._shards.rank, name)

    def reduce(
        self,
        reduction: Reduction,
        manager: QuorumWire,
        states: Sequence[SyncedState],
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None,
    ) -> Sequence[torch.Tensor]:
        """Sum the messages of neighbouring ``states``, which lie one after the other in ``values``; see ``Reduction``."""
        assert isinstance(manager, LeaderManager)
        wants_residual = residual is not None  # on all ranks or on none
        by_state = zip(states, _split(states, values), _split(states, residual), strict=True)
        for state, own, own_residual in by_state:
            index = self._index[id(state)]
            sections = [state.elements] * state.facts.values_per_element + [state.plain_numbers]
            parts = own.split(sections)
            residuals = own_residual.split(sections) if own_residual is not None else [None] * len(sections)
            for part, residual_part in zip(parts[:-1], residuals[:-1], strict=True):
                for batch in self._shards.batches(self._names[index], self._bucket_elements):
                    self._reduce_batch(reduction, manager, state, batch, part, residual_part, wants_residual, of)
            self._reduce_numbers(reduction, manager, parts[-1], of)
        return ()

    def share_parts(self, stretches: Sequence[torch.Tensor]) -> None:
        """Nothing: every rank has been given all of its own."""

    def _reduce_batch(
        self,
        reduction: Reduction,
        manager: LeaderManager,
        state: SyncedState,
        names: Sequence[str],
        part: torch.Tensor,
        residual_part: torch.Tensor | None,
        wants_residual: bool,
        of: RoundFacts,
    ) -> None:
        own = dict(zip(state.names, state.tensors.split(part), strict=True))
        whole = self._shards.collect(names, own)
        whole_residual = None
        if whole is not None:
            whole_residual = torch.empty_like(whole) if wants_residual else None
            reduction.reduce(manager.leading, whole, of, whole_residual)
        for name, shard in self._shards.scatter(names, whole).items():
            own[name].copy_(shard)
        if wants_residual and residual_part is not None:
            own_residual = dict(zip(state.names, state.tensors.split(residual_part), strict=True))
            for name, shard in self._shards.scatter(names, whole_residual).items():
                own_residual[name].copy_(shard)

    def _reduce_numbers(
        self, reduction: Reduction, manager: LeaderManager, numbers: torch.Tensor, of: RoundFacts
    ) -> None:
        """Plain numbers are the same on all ranks of a site: the leader's travel."""
        if not numbers.numel():
            return
        summed = numbers.to("cpu", copy=True)
        if self._shards.is_leader:
            reduction.reduce(manager.leading, summed, of)
        self._shards.share_tensor(summed)
        numbers.copy_(summed)


def _split(states: Sequence[SyncedState], flat: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None] * len(states) if flat is None else list(flat.split([state.numel for state in states]))
