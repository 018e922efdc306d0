"""The quorums that torchft's manager is given: the sites that were admitted, and enough of them."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any

from torch.distributed import TCPStore

from titan_ext.errors import UserError
from titan_ext.replica.address import is_listening
from titan_ext.replica.membership.admission import Admission, AdmissionResult
from titan_ext.replica.membership.admission_protocol import MemberInfo
from titan_ext.replica.torchft_internals import QuorumClient, QuorumResult
from titan_ext.semi_sync.plan.regions import names_in_common

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_POLL_SECONDS = 2.0
_REMINDER_SECONDS = 30.0
# Where quorums are closer than this, the state is so small that it may as well travel in one.
_LONG_SECONDS = 30.0
_LONG_SPACING = 2.0
"""Times the usual spacing of quorums, after which a site may have hung: to ask the lighthouse costs two round trips."""


class AdmittedQuorumClient:
    """A ``QuorumClient`` whose quorums hold the admitted sites alone.

    All ranks of a site follow one result. As long as the lighthouse reports the same quorum with
    everybody admitted, the group stays and nothing travels.

    Args:
        client: of the site's manager server.
        ranks: of the site.
        store: the site's own store.
        admission: rank 0 has it, the others None.
        min_sites: fewer admitted sites wait for more.
        abort_group: called before a new group is agreed on, to end the old one.
        lighthouse: its URL, to log while a quorum takes its time whether it is there; None logs nothing.
        prefetch: called with ``replica_id`` and the ``seconds`` it may take before a quorum of this process, not the
            first, if the others may have had one without it: its vote failed, or the last quorum is long ago, also by the
            spacing of the two before.
    """

    def __init__(
        self,
        client: QuorumClient,
        *,
        ranks: int,
        store: TCPStore,
        admission: Admission | None,
        min_sites: int,
        abort_group: Callable[[], None],
        lighthouse: str | None = None,
        prefetch: Callable[..., Any] | None = None,
    ) -> None:
        self._client = client
        self._ranks = ranks
        self._store = store
        self._admission = admission
        self._min_sites = min_sites
        self._abort_group = abort_group
        self._lighthouse = lighthouse
        self._prefetch = prefetch
        self.last_vote_failed = False
        """Whether the site's last vote was a no."""
        self._last_quorum_at = -math.inf
        self._last_spacing = 0.0
        self._last_quorum: tuple[int, list[str]] | None = None
        self._replica_id: str | None = None
        self._result = AdmissionResult()
        self._result_count = 0
        self._group_id = -1
        self._too_few_sites = False

    @property
    def problem(self) -> str | None:
        """Why the last quorum came to nothing."""
        return self._result.problem

    def waiting_for(self) -> str:
        """What keeps a quorum from coming about, for people."""
        if not self._too_few_sites:
            return f"waiting for {self._min_sites} site(s) at least (replica.min_sites), and for those alive but busy"
        names = ", ".join(self._result.unauthenticated)
        uncounted = f", not counting {names}: another secret (replica.secret_file)" if names else ""
        here = len(self._result.members)
        if self._result.waits_for:
            return f"{here} of {self._result.waits_for} site(s) here that the run begins with (replica.expected_sites)"
        return f"{here} of at least {self._min_sites} site(s) (replica.min_sites) here{uncounted}"

    def quorum(
        self, *, group_rank: int, step: int, timeout: timedelta, init_sync: bool, **request: Any
    ) -> QuorumResult:
        """One quorum of admitted sites, or of this site alone if ``problem`` says so.

        Raises:
            UserError: the sites that are running do not admit this one.
            TimeoutError: they were not enough in time.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        self._too_few_sites = False
        spacing = time.monotonic() - self._last_quorum_at
        if self._prefetch is not None and self._replica_id is not None and self._may_be_behind(spacing):
            self._prefetch(replica_id=self._replica_id, seconds=timeout.total_seconds())
        with nullcontext() if self._lighthouse is None else _QuorumLog(self._lighthouse, self.waiting_for):
            quorum = self._wait_for_quorum(group_rank, step, init_sync, deadline, request)
        self._last_spacing = spacing if math.isfinite(spacing) else 0.0
        return quorum

    def _wait_for_quorum(
        self, group_rank: int, step: int, init_sync: bool, deadline: float, request: dict[str, Any]
    ) -> QuorumResult:
        while True:
            left = timedelta(seconds=max(0.001, deadline - time.monotonic()))
            quorum = self._client.quorum(group_rank=group_rank, step=step, timeout=left, init_sync=init_sync, **request)
            unchanged = self._is_unchanged(quorum)
            if not unchanged:
                # Before the admission, which takes time: a collective of the old group may still wait for a site that
                # has gone, and torchft ends the group only when it builds the next one.
                self._abort_group()
                self._result = self._admit(quorum, step, deadline)
                self._last_quorum = quorum.quorum_id, quorum.replica_ids
                self._replica_id = quorum.replica_ids[quorum.replica_rank]
            self._last_quorum_at = time.monotonic()
            result = self._result
            if result.is_final:
                raise UserError(result.problem)
            if result.problem is not None:
                return self._failed_quorum()
            if len(result.members) >= self._min_sites and not result.waits_for:
                return self._admitted_quorum(quorum, group_rank, init_sync, unchanged)
            self._wait_for_more(deadline)

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        """The vote of the site's ranks."""
        committed = self._client.should_commit(group_rank, step, should_commit, timeout=timeout)
        self.last_vote_failed = not committed
        return committed

    def _may_be_behind(self, spacing: float) -> bool:
        return self.last_vote_failed or spacing > max(_LONG_SECONDS, _LONG_SPACING * self._last_spacing)

    def _is_unchanged(self, quorum: QuorumResult) -> bool:
        result = self._result
        if result.problem is not None or result.waits_for or len(result.members) < len(quorum.replica_ids):
            return False
        return self._last_quorum == (quorum.quorum_id, quorum.replica_ids)

    def _admit(self, quorum: QuorumResult, step: int, deadline: float) -> AdmissionResult:
        """Rank 0's result of the admission, which the other ranks of the site read from its store.

        All ranks come here equally often, since torchft's manager server answers all of them or none: so the
        count names one result.
        """
        prefix = f"titan_ext/admission/{quorum.replica_ids[quorum.replica_rank]}/"
        self._result_count += 1
        key = f"{prefix}{self._result_count}"
        if self._admission is None:
            left = max(0.001, deadline - time.monotonic())
            self._store.wait([key], timedelta(seconds=left))
            return AdmissionResult.from_json(self._store.get(key).decode())
        result = self._admission.decide(quorum, step)
        if self._ranks > 1:
            self._store.set(key, result.to_json())
            # All ranks have read the last one, or they would not have come for this quorum.
            self._store.delete_key(f"{prefix}{self._result_count - 1}")
        return result

    def _failed_quorum(self) -> QuorumResult:
        """A quorum for a round that fails: nobody to heal, and no group to be made."""
        result = QuorumResult()
        result.quorum_id = self._group_id
        return result

    def _admitted_quorum(self, quorum: QuorumResult, group_rank: int, init_sync: bool, unchanged: bool) -> QuorumResult:
        if not unchanged:
            restrict_to_members(quorum, self._result.members, self._result.own_rank, group_rank, init_sync)
        # torchft makes a new group of the ranks when this number changes, and names their store's keys by it.
        self._group_id = quorum.quorum_id = self._result.group_id
        return quorum

    def _wait_for_more(self, deadline: float) -> None:
        self._too_few_sites = True
        if time.monotonic() + _RETRY_SECONDS > deadline:
            raise TimeoutError("too few sites")
        time.sleep(_RETRY_SECONDS)


class _QuorumLog:
    """Checks on the lighthouse from a thread of its own for as long as the context lasts.

    Args:
        lighthouse: its URL.
        waiting_for: what the site waits for while the lighthouse is there.
    """

    def __init__(self, lighthouse: str, waiting_for: Callable[[], str]) -> None:
        self._lighthouse = lighthouse
        self._waiting_for = waiting_for
        self._finished = threading.Event()
        self._is_lost = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="titan_ext-quorum-log")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        if error is None:
            self._log_change(is_lost=False)

    def _run(self) -> None:
        started = reminded = time.monotonic()
        while not self._finished.wait(_POLL_SECONDS):
            self._log_change(is_lost=not is_listening(self._lighthouse))
            now = time.monotonic()
            if now - reminded >= _REMINDER_SECONDS:
                reminded = now
                reason = "the lighthouse does not answer" if self._is_lost else self._waiting_for()
                logger.info("%.0f s in the quorum: %s", now - started, reason)

    def _log_change(self, *, is_lost: bool) -> None:
        if is_lost and not self._is_lost:
            logger.warning("the lighthouse at %s has gone; the site waits until it is back", self._lighthouse)
        elif self._is_lost and not is_lost:
            logger.warning("the lighthouse at %s is back", self._lighthouse)
        self._is_lost = is_lost


def restrict_to_members(
    quorum: QuorumResult, members: Sequence[MemberInfo], own_rank: int, group_rank: int, init_sync: bool
) -> None:
    """Turn a quorum of the lighthouse into one of the admitted sites: their ranks, and who gives the state to whom.

    Source: ``compute_quorum_results`` in torchft's ``manager.rs``, which does it for all sites of a quorum, wherever they are.
    Here the nearest give it: those whose region has most in common with the receiver's.

    Args:
        quorum: changed in place.
        members: the admitted sites by rank.
        own_rank: this site's.
        group_rank: this rank within its site.
        init_sync: whether all start from one site's state.
    """
    max_step = max(info.step for info in members)
    up_to_date = [rank for rank, info in enumerate(members) if info.step == max_step]
    primary = up_to_date[group_rank % len(up_to_date)]
    current = [primary] if init_sync and max_step == 0 else up_to_date
    behind = [rank for rank in range(len(members)) if rank not in current]
    sources = {}
    for order, rank in enumerate(behind):
        near = _nearest(members, current, members[rank].region)
        sources[rank] = near[(order + group_rank) % len(near)]
    source = sources.get(own_rank)
    quorum.replica_rank, quorum.replica_world_size = own_rank, len(members)
    quorum.replica_ids = [info.replica_id for info in members]
    quorum.store_address = members[primary].store
    quorum.max_step, quorum.max_world_size = max_step, len(up_to_date)
    quorum.max_replica_rank = up_to_date.index(own_rank) if own_rank in up_to_date else None
    quorum.heal, quorum.recover_src_replica_rank = source is not None, source
    quorum.recover_src_manager_address = "" if source is None else members[source].manager
    quorum.recover_dst_replica_ranks = [rank for rank in behind if sources[rank] == own_rank]


def _nearest(members: Sequence[MemberInfo], ranks: Sequence[int], region: str) -> list[int]:
    """Those of the ranks whose regions are nearest to this one."""
    common = {rank: names_in_common(members[rank].region, region) for rank in ranks}
    return [rank for rank in ranks if common[rank] == max(common.values())]
