"""What torchft's manager calls as its client: a quorum is the sites that were admitted, and enough of them."""

import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore
from torchft._torchft import ManagerClient, QuorumResult

from titan_ext.errors import UserError
from titan_ext.replica.membership.admission import Decision, Doorkeeper
from titan_ext.replica.membership.admission_protocol import Card

_PAUSE_SECONDS = 1.0
# Where quorums are closer than this, the state is so small that it may as well travel in one.
_LONG_AGO_SECONDS = 30.0


class AdmittedQuorums:
    """A ``ManagerClient`` whose quorums are admitted by the site's doorkeeper.

    All ranks of a site get one decision. As long as the lighthouse reports the same quorum with
    everybody admitted, the group stays and nothing travels.

    Args:
        client: torchft's.
        ranks: of the site.
        store: the site's own store.
        doorkeeper: rank 0 has it, the others None.
        min_sites: fewer admitted sites wait for more.
        leave: called before a new group is agreed, to end the old one.
        catch_up: called with ``replica_id`` and the ``seconds`` it may take before a quorum of this process, not the
            first, if the others may have had one without it: its vote failed, or the last quorum is long ago.
    """

    def __init__(
        self,
        client: ManagerClient,
        *,
        ranks: int,
        store: TCPStore,
        doorkeeper: Doorkeeper | None,
        min_sites: int,
        leave: Callable[[], None],
        catch_up: Callable[..., Any] | None = None,
    ) -> None:
        self._client = client
        self._ranks = ranks
        self._store = store
        self._doorkeeper = doorkeeper
        self._min_sites = min_sites
        self._leave = leave
        self._catch_up = catch_up
        self._failed = False
        self._last_quorum = -math.inf
        self._met: tuple[int, list[str]] | None = None
        self._replica_id: str | None = None
        self._decision = Decision()
        self._decisions = 0
        self._group = -1
        self._too_few = False

    @property
    def problem(self) -> str | None:
        """Why the last quorum came to nothing."""
        return self._decision.problem

    def waiting_for(self) -> str:
        """What keeps a quorum from coming about, for people."""
        if not self._too_few:
            return f"waiting for {self._min_sites} site(s) at least (replica.min_sites), and for those alive but busy"
        strangers = ", ".join(self._decision.strangers)
        uncounted = f", not counting {strangers}: another secret (replica.secret_file)" if strangers else ""
        here = len(self._decision.cards)
        if self._decision.waits_for:
            return f"{here} of {self._decision.waits_for} site(s) here that the run begins with (replica.expected_sites)"
        return f"{here} of at least {self._min_sites} site(s) (replica.min_sites) here{uncounted}"

    def _quorum(
        self, *, group_rank: int, step: int, timeout: timedelta, init_sync: bool, **request: Any
    ) -> QuorumResult:
        """One quorum of admitted sites, or of this site alone if ``problem`` says so.

        Raises:
            UserError: the sites that are running do not admit this one.
            TimeoutError: they were not enough in time.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        self._too_few = False
        if self._catch_up is not None and self._replica_id is not None and self._may_be_behind():
            self._catch_up(replica_id=self._replica_id, seconds=timeout.total_seconds())
        while True:
            left = timedelta(seconds=max(0.001, deadline - time.monotonic()))
            quorum = self._client._quorum(
                group_rank=group_rank, step=step, timeout=left, init_sync=init_sync, **request
            )
            known = self._is_known(quorum)
            if not known:
                self._leave()
                self._decision = self._decided(quorum, step, deadline)
                self._met = quorum.quorum_id, quorum.replica_ids
                self._replica_id = quorum.replica_ids[quorum.replica_rank]
            self._last_quorum = time.monotonic()
            decision = self._decision
            if decision.final:
                raise UserError(decision.problem)
            if decision.problem is not None:
                return self._alone()
            if len(decision.cards) >= self._min_sites and not decision.waits_for:
                return self._of_group(quorum, group_rank, init_sync, known)
            self._wait_for_more(deadline)

    def _checkpoint_metadata(self, rank: int, timeout: timedelta) -> str:
        return self._client._checkpoint_metadata(rank, timeout=timeout)

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        """The vote of the site's ranks."""
        committed = self._client.should_commit(group_rank, step, should_commit, timeout=timeout)
        self._failed = not committed
        return committed

    def _may_be_behind(self) -> bool:
        return self._failed or time.monotonic() > self._last_quorum + _LONG_AGO_SECONDS

    def _is_known(self, quorum: QuorumResult) -> bool:
        if self.problem is not None or self._decision.waits_for or len(self._decision.cards) < len(quorum.replica_ids):
            return False
        return self._met == (quorum.quorum_id, quorum.replica_ids)

    def _decided(self, quorum: QuorumResult, step: int, deadline: float) -> Decision:
        """The doorkeeper's decision, told to all ranks of the site through its store."""
        own = f"titan_ext/decision/{quorum.replica_ids[quorum.replica_rank]}/"
        self._decisions += 1
        key = f"{own}{self._decisions}"
        if self._doorkeeper is None:
            left = max(0.001, deadline - time.monotonic())
            self._store.wait([key], timedelta(seconds=left))
            return Decision.parse(self._store.get(key).decode())
        decision = self._doorkeeper.decide(quorum, step)
        if self._ranks > 1:
            self._store.set(key, decision.text())
            # All ranks have read the last one, or they would not have come for this quorum.
            self._store.delete_key(f"{own}{self._decisions - 1}")
        return decision

    def _alone(self) -> QuorumResult:
        """A quorum for a round that fails: nobody to heal, and no group to be made."""
        result = QuorumResult()
        result.quorum_id = self._group
        return result

    def _of_group(self, quorum: QuorumResult, group_rank: int, init_sync: bool, known: bool) -> QuorumResult:
        if not known:
            place_in_group(quorum, self._decision.cards, self._decision.own, group_rank, init_sync)
        # torchft makes a new group of the ranks when this number changes, and names their store's keys by it.
        self._group = quorum.quorum_id = self._decision.group
        return quorum

    def _wait_for_more(self, deadline: float) -> None:
        self._too_few = True
        if time.monotonic() + _PAUSE_SECONDS > deadline:
            raise TimeoutError("too few sites")
        time.sleep(_PAUSE_SECONDS)


def place_in_group(
    quorum: QuorumResult, cards: Sequence[Card], own: int, group_rank: int, init_sync: bool
) -> None:
    """Who gives the state to whom among the admitted sites, as torchft's manager server does it for all.

    Source: ``compute_quorum_results`` in torchft's ``manager.rs``.

    Args:
        quorum: changed to that of the admitted sites.
        cards: theirs, by rank.
        own: this site's rank.
        group_rank: this rank within its site.
        init_sync: whether all start from one site's state.
    """
    newest = max(card.step for card in cards)
    leaders = [rank for rank, card in enumerate(cards) if card.step == newest]
    primary = leaders[group_rank % len(leaders)]
    current = [primary] if init_sync and newest == 0 else leaders
    behind = [rank for rank in range(len(cards)) if rank not in current]
    sources = {rank: current[(order + group_rank) % len(current)] for order, rank in enumerate(behind)}
    source = sources.get(own)
    quorum.replica_rank, quorum.replica_world_size = own, len(cards)
    quorum.replica_ids = [card.replica_id for card in cards]
    quorum.store_address = cards[primary].store
    quorum.max_step, quorum.max_world_size = newest, len(leaders)
    quorum.max_replica_rank = leaders.index(own) if own in leaders else None
    quorum.heal, quorum.recover_src_replica_rank = source is not None, source
    quorum.recover_src_manager_address = "" if source is None else cards[source].manager
    quorum.recover_dst_replica_ranks = [rank for rank in behind if sources[rank] == own]
