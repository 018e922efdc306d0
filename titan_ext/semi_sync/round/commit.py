"""The end of a round: the vote, and what follows from it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from titan_ext.error_text import reason
from titan_ext.errors import RunError
from titan_ext.semi_sync.plan.schedule import Progress, Schedule
from titan_ext.semi_sync.round.agreement import SiteStatus
from titan_ext.semi_sync.round.contributions import Sum, is_finite, mean_is_finite
from titan_ext.semi_sync.round.exchange import Exchange
from titan_ext.semi_sync.round.outer_norms import OuterNorms
from titan_ext.semi_sync.round.participation import Participation
from titan_ext.semi_sync.round.round import Role, RoundResult
from titan_ext.semi_sync.round.spans import span
from titan_ext.semi_sync.state.checksum import SharedChecksum
from titan_ext.semi_sync.state.synced_state import TakenFromPeers
from titan_ext.semi_sync.state.views import ModelView
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord

logger = logging.getLogger(__name__)

_OTHERS_ERROR = "a rank or site of the round failed"

# Rounds one after the other in which no site's work is finite: after more the run does not come back by itself.
_MOST_BROKEN_ROUNDS = 3


@dataclass(slots=True, kw_only=True)
class Committer:
    """Votes on a round that has been exchanged, and applies it, or has it tried again."""

    exchange: Exchange
    schedule: Schedule
    progress: Progress
    checksum: SharedChecksum
    participation: Participation
    view: ModelView
    norms: OuterNorms
    reset_inner_optimizer: bool
    keep_local_work: bool
    """After a round that was not committed, keep what was done since the last one."""
    on_round: Callable[[RoundRecord], None] | None
    """Called with the record of every round."""
    grace_seconds: float = 0.0
    """For which a round waits for a late site; 0 if that is not known."""
    ledger: Ledger = field(default_factory=Ledger)
    _broken_rounds: int = field(default=0, init=False)
    """Rounds one after the other in which no site's work was finite."""
    _told_of_no_weight: bool = field(default=False, init=False)
    _known: set[str] = field(default_factory=set, init=False)
    """Names of the sites that have been in a quorum with this one."""

    def commit(self, result: RoundResult) -> bool:
        """Vote; whether all ranks of the site were without error, and the round is applied. Otherwise it is tried again.

        Raises:
            RunError: no site's work was finite in several rounds one after the other, or the outer step has left the range
                of numbers.
        """
        started = self.exchange.clock.now()
        manager, lineage, healing = self.exchange.manager, self.exchange.lineage, self.exchange.healing
        self.take_over(result)
        failure, contributors = manager.errored(), result.contributors
        with span("vote"):
            committed = manager.should_commit()
        if committed:
            if result.verdict.opening is not None:
                lineage.open(manager, *result.verdict.opening)
            if result.sum is not None:
                if contributors:
                    with span("apply"):
                        self.exchange.complete(result.sum)
                        finite = mean_is_finite_on_all_ranks(self.exchange, result.sum, result.verdict.step)
                        contributors = contributors if finite else []
                        if contributors:
                            self._apply(result, result.sum, contributors)
                self._recover(result.sum, applied=bool(contributors))
        else:
            self._undo(result, failure)
            healing.give_up(result)
        self.participation.after_round(result, manager.participating_rank(), committed)
        rules = result.rules
        if rules:
            took = self.exchange.clock.now() - started
            self._record(rules, result, contributors if committed else [], committed, failure, took)
        healing.end()
        return committed

    def take_over(self, result: RoundResult) -> None:
        """A newcomer takes rows of tables from whoever holds them; again in the next round if the vote is a no."""
        if result.taken_over and result.role.abstains and self.exchange.manager.errored() is None:
            for index, messages in result.taken_over.items():
                state = self.exchange.states[index]
                assert isinstance(state, TakenFromPeers)
                state.take_over(messages)

    def _apply(self, result: RoundResult, summed: Sum, contributors: list[int]) -> None:
        states, step = self.exchange.states, result.verdict.step
        of = {group: summed.of_group(group, step) for group in ("", *self.exchange.groups)}
        self.norms.before_apply(summed.parts.items(), of[""].total_weight, step)
        for index, part in summed.parts.items():
            if of[states[index].rule.group].total_weight > 0:  # a group's sites may all have nothing to give
                state, group = states[index], of[states[index].rule.group]
                state.apply_beside_work(part, group) if result.keeps_work else state.apply(part, group)
        self._check_global(summed, step)
        self.norms.after_apply(list(summed.parts), summed.contributions)
        self.exchange.writer.error_feedback.settle(summed)
        if self.reset_inner_optimizer:
            self.view.reset_optimizers()
        self._count_staleness(result, summed)
        self._warn_of_short_grace(result)
        if not result.keeps_work:
            # What was trained on during a flight counts in the next round.
            self.progress.tokens = 0 if result.role.abstains else self.progress.tokens - result.launch.tokens
            if result.role.abstains:
                self.progress.work.clear()
            self.progress.settle_work(result.launch.work, summed.parts)
        if summed.remembered is not None:
            self.progress.share = summed.remembered
        if self.exchange.plan.lateness.trains_on and result.role is Role.MEMBER:
            self._follow_furthest(result)
        self.schedule.settle(summed.parts)
        changed = {states[index].key for index in summed.parts}
        checksum = self.checksum.after(changed)
        of_groups = {group: self.checksum.after(changed, group) for group in self.exchange.groups}
        self.exchange.lineage.commit(
            result.verdict.table, contributors, step, checksum, of_groups, [states[index].key for index in summed.parts]
        )
        if self.exchange.plan.lateness.trains_on and result.keeps_work:
            # At once, and so in time: by its own pace a slow site would come too late for every fragment.
            self.schedule.again(self.exchange.plan.next_in_turn(self.exchange.lineage.commits))

    def _warn_of_short_grace(self, result: RoundResult) -> None:
        """Once, where it is shorter than the fastest site's inner steps between two rounds."""
        plan, times = self.exchange.plan, [site.step_time_ms for site in result.verdict.table if site.step_time_ms]
        between = plan.round_spacing * min(times, default=0) / 1000 if plan.lateness.keeps_work else 0.0
        if 0 < self.grace_seconds < between:
            logger.warning(
                "replica.join_timeout_seconds = %g is shorter than the inner steps between two rounds (%.1f s): it runs from "
                "the first site that asks, so where a late one asks in the midst of them it is over when the others come, and "
                "the last of those are late in turn; let it be longer",
                self.grace_seconds,
                between,
            )
            self.grace_seconds = 0.0  # said once

    def _follow_furthest(self, result: RoundResult) -> None:
        """The run's count of inner steps is that of the site that is furthest; another one has taken fewer.

        That site has come to the round at the step of the verdict, and taken the steps that overlap the exchange since; what
        this one took while it waited for it is not on top of that.
        """
        before = self.progress.step
        delay = max(self.exchange.states[index].rule.delay for index in result.rules)
        there = result.verdict.step + min(before - result.launch.step, delay)
        self.progress.step = max(before, there)
        self.schedule.catch_up(before, self.progress.step)

    def _count_staleness(self, result: RoundResult, summed: Sum) -> None:
        """What this site still has to bring has become older by a commit; what it has brought, or dropped, begins anew."""
        stale = self.progress.staleness
        if result.role.abstains or not summed.own_is_finite:
            stale.clear()
        for index in summed.parts:
            if result.keeps_work:
                stale[index] = stale.get(index, 0) + 1
            else:
                stale.pop(index, None)

    def _check_global(self, summed: Sum, step: int) -> None:
        """End a run whose outer step has left the range of numbers, before a checkpoint or a joining site has it."""
        states = [self.exchange.states[index] for index in summed.parts]
        values = [each for state in states if state.facts.equal_at_all_sites for each in state.global_values()]
        if not all(self.exchange.site.gather(all(map(is_finite, values)))):
            raise RunError(
                f"the parameters that the sites share are not finite after the outer step at inner step {step}: lower the "
                "learning rates, semi_sync.outer_lr first"
            )

    def _recover(self, summed: Sum, applied: bool) -> None:
        """After a round that left this site out as not finite, or all, go on from what the sites share."""
        if summed.own_is_finite and not summed.contributions.contributors and not self._told_of_no_weight:
            self._told_of_no_weight = True
            logger.warning("a round of which no site has any weight changes nothing (no tokens, or none that counts)")
        overflow = bool(summed.contributions.contributors) and not applied
        broken = overflow or (not summed.own_is_finite and not summed.contributions.contributors)
        self._broken_rounds = self._broken_rounds + 1 if broken else 0
        if self._broken_rounds > _MOST_BROKEN_ROUNDS:
            raise RunError(
                f"no site's work was finite in {self._broken_rounds} rounds one after the other, though each began with "
                "what the sites shared before: lower the learning rate, or look at the data"
            )
        if overflow or not summed.own_is_finite:
            # All of the model: what another fragment still holds would spoil this one in the next inner step.
            for state in self.exchange.states:
                state.reset_local_to_global()
            self.view.reset_broken_states()

    def _undo(self, result: RoundResult, failure: object | None) -> None:
        # Where bits differ, nobody's work is at fault.
        if not self.keep_local_work and not result.verdict.states_differ:
            for index in result.launch.rules or result.rules:
                self.exchange.states[index].reset_local_to_global()
        elif not result.healed:
            self.schedule.again(result.launch.rules)
        # Until the lighthouse has forgotten who died, the next quorum would be waited for; rather train on.
        wait = result.retry_after_steps if failure is not None and result.verdict.problem is None else 0
        again = max(self.progress.step + wait, result.verdict.resync_step)
        self.schedule.not_before = max(self.exchange.site.gather(again))

    def _record(
        self,
        rules: Sequence[int],
        result: RoundResult,
        contributors: Sequence[int],
        committed: bool,
        failure: object | None,
        seconds: float,
    ) -> None:
        moved = self.exchange.take_bytes()
        exchanged = result.seconds_exchanged
        waited = exchanged if result.seconds_waited is None else result.seconds_waited
        record = RoundRecord(
            round=self.exchange.lineage.position.round,
            step=self.progress.step,
            rules=[self.exchange.states[index].key for index in rules],
            participants=len(contributors),
            contributors=[result.verdict.name(rank) for rank in contributors],
            tokens=sum(result.verdict.table[rank].tokens for rank in contributors),
            sites=result.sites,
            measures={name: value for index in rules for name, value in self.exchange.states[index].measures.items()}
            | self._standings(result),
            **moved,
            seconds_waiting=result.seconds_waiting,
            seconds_quorum=result.seconds_quorum,
            seconds_reduce=result.sum.seconds if result.sum is not None else 0.0,
            seconds_apply=seconds,
            committed=committed,
            healed=result.healed,
            error=None if committed else why_not_committed(result, failure),
            missing=self._missing(result) if committed else {},
            staleness=_staleness(result) if committed else {},
            seconds_stalled=waited + seconds,
            seconds_hidden=max(0.0, exchanged - waited),
            **self.norms.take(),
        )
        self.ledger.add(record)
        if not committed:
            logger.warning("round after inner step %d was not committed: %s", record.step, record.error)
        if self.on_round is not None:
            self.on_round(record)

    def _standings(self, result: RoundResult) -> dict[str, float]:
        """Where sites are weighed by loss, that of each and its part of the weight."""
        if result.sum is None or not self.exchange.weighting.needs_loss:
            return {}
        contributions, found = result.sum.contributions, {}
        for rank, standing in enumerate(contributions.standings):
            found[f"loss of {result.verdict.name(rank)}"] = standing.loss
            found[f"weight of {result.verdict.name(rank)}"] = contributions.weights[rank] / contributions.total_weight
        return {name: value for name, value in found.items() if value >= 0}

    def _missing(self, result: RoundResult) -> dict[str, str]:
        """Sites that did not contribute, and why."""
        table = result.verdict.table
        names = [result.verdict.name(rank) for rank in range(len(table))]
        missing = dict.fromkeys(sorted(self._known - set(names)), "not in the quorum")
        self._known |= {site.name for site in table if site.name}
        contributors = set(result.contributors)
        for rank, site in enumerate(table):
            if result.sum is not None and rank not in contributors:
                missing[names[rank]] = _why_without_weight(site)
        return missing


def why_not_committed(result: RoundResult, failure: object | None) -> str:
    """Why a round is not committed, in a line; torchft adds a stack to what it has met with."""
    cause = getattr(failure, "original_exception", failure)
    # Where a leader speaks for the site, the others have it as text.
    text = reason(cause) if isinstance(cause, BaseException) else str(cause or _OTHERS_ERROR)
    return result.verdict.problem or text


def mean_is_finite_on_all_ranks(exchange: Exchange, summed: Sum, step: int) -> bool:
    """Whether what the sites come to is a number everywhere: sums and codecs of finite values may overflow.

    A collective over the site, whose ranks hold parts of it. Sites with the same sum find the same.
    """
    groups = {index: exchange.states[index].rule.group for index in summed.parts}
    weights = {index: summed.of_group(group, step).total_weight for index, group in groups.items()}
    own = all(mean_is_finite(part, weights[index]) for index, part in summed.parts.items())
    finite = all(exchange.site.gather(own))
    if not finite:
        logger.warning("the mean of the sites' work after inner step %d is not finite; it is left out", step)
    return finite


def _staleness(result: RoundResult) -> dict[str, int]:
    """By name of each contributor whose work began at an older commit."""
    if result.sum is None:
        return {}
    stale = result.sum.contributions.staleness
    return {result.verdict.name(rank): missed for rank, missed in enumerate(stale) if missed}


def _why_without_weight(site: SiteStatus) -> str:
    if site.rules is None:
        return "joining"
    if site.late:
        return "late, with another part of the model; its work goes into a later round"
    return "its data has ended" if site.done else "not sampled, not finite, an outlier, or without weight"
