"""The end of a round: the vote, and what follows from it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.profiler import record_function

from titan_ext.errors import RunError
from titan_ext.semi_sync.plan.sampling import SiteSampler
from titan_ext.semi_sync.plan.schedule import Progress, Schedule
from titan_ext.semi_sync.round.end_of_data import EndOfData
from titan_ext.semi_sync.round.exchange import Exchange, record_fields
from titan_ext.semi_sync.round.round import RoundResult, Sum
from titan_ext.semi_sync.state.checksum import SharedChecksum
from titan_ext.semi_sync.state.synced_state import AppliedRound
from titan_ext.semi_sync.state.views import ModelView
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord

logger = logging.getLogger(__name__)


# Rounds one after the other in which no site's work is finite: after more the run does not come back by itself.
_MOST_BROKEN_ROUNDS = 3


@dataclass(slots=True, kw_only=True)
class Committer:
    """Votes on a round that has been exchanged, and applies it, or has it tried again."""

    exchange: Exchange
    schedule: Schedule
    progress: Progress
    checksum: SharedChecksum
    sampler: SiteSampler
    end_of_data: EndOfData
    view: ModelView
    ledger: Ledger
    reset_inner_optimizer: bool
    keep_local_work: bool
    """After a round that was not committed, keep what was done since the last one."""
    on_round: Callable[[RoundRecord], None] | None
    """Called with the record of every round."""
    _broken_rounds: int = field(default=0, init=False)
    """Rounds one after the other in which no site's work was finite."""

    def commit(self, result: RoundResult) -> bool:
        """Whether all ranks of the site were without error and the round counts.

        Raises:
            RunError: no site's work was finite in several rounds one after the other.
        """
        started = self.exchange.clock.now()
        manager, lineage = self.exchange.manager, self.exchange.lineage
        failure = manager.errored()
        with record_function("titan_ext::vote"):
            committed = manager.should_commit()
        if committed:
            if result.verdict.opening is not None:
                lineage.open(manager, *result.verdict.opening)
            if result.sum is not None and result.contributors:
                with record_function("titan_ext::apply"):
                    self._apply(result, result.sum)
            if result.sum is not None:
                self._recover(result.sum)
            self.sampler.after_round([site.name for site in result.verdict.table], result.verdict.step)
        else:
            self._undo(result, failure)
            self.exchange.healing.give_up(result)
        self.end_of_data.settle(result, committed)
        if result.rules:
            self._record(result, committed, failure, self.exchange.clock.now() - started)
        return committed

    def _apply(self, result: RoundResult, summed: Sum) -> None:
        states, step = self.exchange.states, result.verdict.step
        total = summed.contributions.total_weight
        of = AppliedRound(step=step, weight=summed.weight, total_weight=total, ages=summed.ages)
        for index, part in summed.parts(states):
            states[index].apply(part, of)
        self.exchange.error_feedback.settle(summed)
        if self.reset_inner_optimizer:
            self.view.reset_optimizers()
        # What was trained on during a flight counts in the next round.
        self.progress.tokens = 0 if result.role.abstains else self.progress.tokens - result.launch.tokens
        self.schedule.settle(summed.rules)
        lineage = self.exchange.lineage
        lineage.advance()
        checksum = self.checksum.after({states[index].key for index in summed.rules})
        lineage.record(result.verdict.table, result.contributors, step, checksum)

    def _recover(self, summed: Sum) -> None:
        """After a round that left this site out as not finite, go on from what the sites share."""
        broken = not summed.own_is_finite and not summed.contributions.contributors
        self._broken_rounds = self._broken_rounds + 1 if broken else 0
        if self._broken_rounds > _MOST_BROKEN_ROUNDS:
            raise RunError(
                f"no site's work was finite in {self._broken_rounds} rounds one after the other, though each began with "
                "what the sites shared before: lower the learning rate, or look at the data"
            )
        if not summed.own_is_finite:
            # All of the model: what another fragment still holds would spoil this one in the next inner step.
            for state in self.exchange.states:
                state.reset_local_to_global()
            self.view.reset_broken_states()

    def _undo(self, result: RoundResult, failure: object | None) -> None:
        if (
            not self.keep_local_work and not result.verdict.states_differ
        ):  # where bits differ, nobody's work is at fault
            for index in result.launch.rules or result.rules:
                self.exchange.states[index].reset_local_to_global()
        elif not result.healed:
            self.schedule.again(result.launch.rules)
        # Until the lighthouse has forgotten who died, the next quorum would be waited for; rather train on.
        wait = result.retry_after_steps if failure is not None and result.verdict.problem is None else 0
        again = max(self.progress.step + wait, result.verdict.resync_step)
        self.schedule.not_before = max(self.exchange.site.gather(again))

    def _record(self, result: RoundResult, committed: bool, failure: object | None, seconds: float) -> None:
        sent = self.exchange.bytes_sent(result)
        record = RoundRecord(
            round=self.exchange.lineage.position.round,
            step=self.progress.step,
            bytes_sent=sent,
            bytes_received=sent,
            seconds_apply=seconds,
            **record_fields(result, committed, failure, self.exchange.states),
        )
        self.ledger.add(record)
        if not committed:
            logger.warning("round after inner step %d was not committed: %s", record.step, record.error)
        if self.on_round is not None:
            self.on_round(record)
