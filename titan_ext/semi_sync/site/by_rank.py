"""Rank r of a site exchanges with rank r of the others: most bandwidth, for sites of equal layout."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from titan_ext.semi_sync.site.copies import Copies
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.site.shards import Piece, piece_of
from titan_ext.semi_sync.state.sparse_tables import SparseTable
from titan_ext.semi_sync.state.synced_state import SyncedState
from titan_ext.semi_sync.wire.manager import QuorumWire, ReplicaManager
from titan_ext.semi_sync.wire.reductions import Reduction, RoundFacts


class ByRank:
    """What a rank holds is what it exchanges.

    Args:
        states: the plan's rules bound to this rank.
        site: the ranks of the site.

    Raises:
        ValueError: tables shared by row are cut over the ranks, which then hold other rows at every site.
    """

    name = "rank"

    def __init__(self, states: Sequence[SyncedState], site: SiteRanks) -> None:
        for state in states:
            if isinstance(state, SparseTable) and any(
                part.shape != state.tensors.view.parameters[name].shape for name, part in _described(state)
            ):
                raise ValueError(
                    'pairing = "rank": tables shared by row are cut over the ranks of the site; '
                    'set semi_sync.pairing = "leader"'
                )
        self._site = site
        self._layout = str(len(site.gather(None)))
        self._copies = Copies([] if site.alone else [(state.key, *_pieces(state)) for state in states], site)

    def fingerprint(self, states: Sequence[SyncedState]) -> dict[str, str]:
        """What sites that pair so must have in common beside their settings: every shard."""
        shards = [
            (state.key, name, state.agreed_shape(tensor.shape), state.sends_difference)
            for state in states
            for name, tensor in _described(state)
        ]
        return {"model and layout": repr(shards), "ranks": self._layout}

    def manager_of_all_ranks(self, manager: ReplicaManager | None) -> ReplicaManager:
        """Every rank has one of its own."""
        assert manager is not None
        return manager

    def speaks_for(self, name: str) -> bool:
        """Whether this rank's shard of a parameter counts in the site's checksum: sites of equal layout count alike."""
        return True

    def reduce(
        self,
        reduction: Reduction,
        manager: QuorumWire,
        states: Sequence[SyncedState],
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None,
    ) -> Sequence[torch.Tensor]:
        """Sum the messages of neighbouring ``states``, which lie one after the other in ``values``; see ``Reduction``.

        Returns:
            what is summed in part alone, until ``share_parts``; for all ranks of the site or none.
        """
        if reduction.sums_over_ranks and not self._site.alone:
            # Its sums over the ranks need all of them: one that knows of an error must not leave the others waiting.
            if not all(self._site.gather(manager.errored() is None)):
                return ()
            of = replace(of, rank_sum=self._site.sum)
        elif self._copies.count > 1 and reduction.cuts_anywhere and all(state.facts.elementwise for state in states):
            own_residual = None if residual is None else self._copies.own_part(residual)
            reduction.reduce(manager, self._copies.own_part(values), of, own_residual)
            return (values,) if residual is None else (values, residual)
        reduction.reduce(manager, values, of, residual)
        return ()

    def share_parts(self, stretches: Sequence[torch.Tensor]) -> None:
        """Have ranks that hold the same give each other what they have summed. A collective over them."""
        self._copies.share_parts(stretches)


def _pieces(state: SyncedState) -> list[tuple[str, Piece]]:
    """Where this rank's part of everything that a state covers lies in the whole."""
    return [(name, piece_of(state.tensors.view.tensor(name))) for name in state.names]


def _described(state: SyncedState) -> list[tuple[str, torch.Tensor]]:
    """Name and local tensor of everything that a state covers on this rank."""
    return list(zip(state.names, state.tensors.locals(), strict=True))
