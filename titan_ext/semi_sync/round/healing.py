"""What a site that is behind receives, and when it may take it in."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from titan_ext.semi_sync.plan.schedule import Progress, Schedule
from titan_ext.semi_sync.round.agreement import Verdict
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.round.round import Launch, Role, RoundResult
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.checksum import SharedChecksum
from titan_ext.semi_sync.state.synced_state import SyncedState
from titan_ext.semi_sync.wire.manager import ReplicaManager

logger = logging.getLogger(__name__)


class Healing:
    """Shared state on its way from member to newcomer.

    A peer's state arrives during a quorum, maybe while the inner loop runs. It is taken in once the sites
    have agreed on a round, by all ranks of the site or by none: a site of which one part is healed would
    hold two models.

    Args:
        states: the plan's rules bound to this rank.
        lineage: the run and how far it has come.
        schedule: what waits for a round; a healed site's is the member's.
        progress: this site's counters; a healed site's step is the member's.
        checksum: of the shared state.
        manager: this rank's replica manager.
        site: the ranks of the site.
        keeps_late_work: whether a site that has missed rounds brings what it has done to a later one.
    """

    def __init__(
        self,
        states: Sequence[SyncedState],
        *,
        lineage: Lineage,
        schedule: Schedule,
        progress: Progress,
        checksum: SharedChecksum,
        manager: ReplicaManager,
        site: SiteRanks,
        keeps_late_work: bool = False,
    ) -> None:
        self._states = states
        self._lineage = lineage
        self._schedule = schedule
        self._progress = progress
        self._checksum = checksum
        self._manager = manager
        self._site = site
        self._arrived: Mapping[str, Any] | None = None
        self._diverged = False
        self._keeps_work = False
        self._keeps_late_work, self._is_late = keeps_late_work, False
        self.missed: dict[int, int] = {}
        """By rule the commits that a late site has missed; until the round's end."""
        self._counters: dict[str, int] = {}
        self._launch: Launch | None = None
        """Of the round under way on this thread or another one, until its vote."""

    @property
    def is_behind(self) -> bool:
        """Whether the state of a peer that is further waits to be taken in."""
        return self._arrived is not None and not self._keeps_work

    @property
    def is_late(self) -> bool:
        """Whether it is, and what this site has done since the commit that it stands at is worth bringing all the same."""
        return self.is_behind and self._is_late

    @property
    def unsettled(self) -> list[int]:
        """Rules whose exchange is under way or still to be tried."""
        return self._schedule.beside(self._launch.rules if self._launch is not None else ())

    def offer(self) -> dict[str, Any]:
        """What a joining site takes over.

        Hazard: its tensors are the live ones. They may be read until the round's commit, which changes them.
        """
        return {
            "step": self._launch.step if self._launch is not None else self._progress.step,
            **self._lineage.state_dict(),
            "pending": self.unsettled,
            "states": {state.key: state.shared_state() for state in self._states},
        }

    def receive(self, state: Mapping[str, Any]) -> None:
        """Keep a peer's state until the round under way can take it in.

        A site is not behind it if it stands at the same commit and only holds other bits of it, such as those of an outer
        optimizer that rounds otherwise on its hardware: then its work since that commit is worth as much as the others'.
        """
        self._arrived = state
        self._keeps_work = self._diverged and self._lineage.stands_with(state)
        trains = self._launch is not None and self._launch.role is Role.MEMBER
        self._is_late = self._keeps_late_work and trains and not self._diverged and self._lineage.is_late_for(state)
        if self._is_late:
            self.missed = self._lineage.missed(state, [each.key for each in self._states])
        if self._keeps_work:
            self._lineage.checksum = 0  # what it is about to take in has another

    def begin(self, launch: Launch) -> None:
        """A round begins: remember where the manager stood."""
        self._launch, self._counters = launch, self._manager.state_dict()

    def end(self) -> None:
        """The round has been voted on."""
        self._launch, self.missed = None, {}

    def manager_state(self) -> dict[str, int]:
        """The manager's counters for a checkpoint: until a peer's state is taken in, those of before it came."""
        return self._counters if self._arrived is not None else self._manager.state_dict()

    def take_in(self, launch: Launch, verdict: Verdict) -> tuple[bool, bool]:
        """Whether all ranks of the site know the round, and whether they took in a peer's state. A collective."""
        fault = self._manager.errored()
        if fault is None and self._arrived is not None:
            fault = self._lineage.accepts(self._arrived)
        # Which ranks were sent something may differ at the very start: torchft lets each begin from another site's.
        if not all(self._site.gather(fault is None)):
            if self._manager.errored() is None:
                self._manager.report_error(RuntimeError(str(fault or "another rank of the site failed")))
            return False, False
        state, self._arrived = self._arrived, None
        if state is not None:
            keeps = self._keeps_work or self._is_late
            for each in self._states:
                theirs = state["states"].get(each.key, {})
                each.correct_shared_state(theirs) if keeps else each.load_shared_state(theirs)
            for rule, count in self.missed.items():
                self._progress.staleness[rule] = self._progress.staleness.get(rule, 0) + count
            self._lineage.take_over(state)
            self._diverged = self._keeps_work = False
            # The state may be a copy that the peer made some inner steps before this round.
            agreed = bool(verdict.rules)
            step, pending = (verdict.step, verdict.rules) if agreed else (state["step"], state["pending"])
            # A round in flight was launched some inner steps ago; those count at the peer's place too. A late site may have
            # trained on for longer than the others.
            ahead = self._progress.step - launch.step
            delay = max((self._states[rule].rule.delay for rule in verdict.rules), default=0)
            self._progress.step = step + (min(ahead, delay) if self._is_late else ahead)
            self._is_late = False
            self._schedule.replace(pending)
            self._checksum.forget()
            logger.info("took the shared state of a peer at inner step %d, round %d", state["step"], state["round"])
        return True, state is not None

    def give_up(self, result: RoundResult) -> None:
        """The round failed: a site that is behind must count as such, so as to be healed in the next one."""
        counters = self._manager.state_dict()
        if self._arrived is not None:
            # It came, and could not be taken in; the manager already counts as healed.
            self._arrived, counters = None, self._counters
        elif result.verdict.diverged:
            # What a group shares comes in a round, from a site of the group, to one that abstains from it.
            self._diverged = not result.verdict.diverged_in_group
            logger.error(
                "this site's shared state is not that of the others (an outer optimizer that rounds otherwise on other "
                "hardware, or a fault); taking theirs, and %s this site's work since the last commit",
                "keeping" if self._diverged else "dropping",
            )
            counters["step"] = max(0, counters["step"] - 1)
        else:
            return
        self._manager.load_state_dict(counters)
