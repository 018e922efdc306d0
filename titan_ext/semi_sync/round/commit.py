"""The end of a round: the vote, and what follows from it."""

import logging
import time
from collections.abc import Callable

from titan_ext.semi_sync.build import Parts
from titan_ext.semi_sync.plan.plan import PARAMETERS
from titan_ext.semi_sync.round.round import Round
from titan_ext.semi_sync.state.synced_state import Landing
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord

logger = logging.getLogger(__name__)


class Settling:
    """Votes on a round that has been exchanged, and applies it, or has it tried again.

    Args:
        parts: of this rank's outer loop.
        keep_local_work: after a round that was not committed, keep what was done since the last one.
        on_round: called with the record of every round.
    """

    def __init__(
        self, parts: Parts, *, keep_local_work: bool, on_round: Callable[[RoundRecord], None] | None
    ) -> None:
        self.ledger = Ledger()
        self._parts = parts
        self._rows = parts.rows
        self._progress = parts.progress
        self._lineage = parts.lineage
        self._keep_local_work = keep_local_work
        self._on_round = on_round

    def settle(self, round_: Round) -> bool:
        """Whether all ranks of the site were without error and the round counts."""
        started = time.perf_counter()
        failure = self._parts.manager.errored()
        committed = self._parts.manager.should_commit()
        if committed:
            if round_.opening is not None:
                self._lineage.open(self._parts.manager, *round_.opening)
            self._apply(round_)
            self._parts.draw.after(round_)
        else:
            self._undo(round_, failure)
            self._parts.healing.give_up(round_)
        if round_.rows:
            self._record(round_, committed, failure, time.perf_counter() - started)
        self._progress.healed = False
        return committed

    def _apply(self, round_: Round) -> None:
        if not round_.rows or not round_.contributors:
            return
        landing = Landing(clock=round_.clock, weight=round_.weight, total_weight=round_.total_weight)
        for index, part in round_.parts(self._rows):
            self._rows[index].apply(part, landing)
        self._parts.exchange.residuals.settle(round_)
        if round_.intent is None and any(self._rows[index].row.state != PARAMETERS for index in round_.rows):
            # Moments that came from the members are as old as theirs.
            self._parts.view.set_optimizer_step(round_.clock)
        if self._parts.config.reset_inner_optimizer:
            self._parts.view.reset_optimizers()
        # What was trained on during a flight counts in the next round.
        self._progress.tokens = 0 if round_.intent is None else self._progress.tokens - round_.tokens
        self._parts.schedule.settle(round_.rows)
        self._lineage.advance()
        checksum = self._parts.checksum.after({self._rows[index].row.key for index in round_.rows})
        self._lineage.record(round_.table, round_.contributors, round_.clock, checksum)

    def _undo(self, round_: Round, failure: object | None) -> None:
        if not self._keep_local_work:
            for index in round_.launched or round_.rows:
                self._rows[index].reset_local_to_global()
        elif not self._progress.healed:
            self._parts.schedule.again(round_.launched)
        # Until the lighthouse has forgotten who died, the next quorum would be waited for; rather train on.
        linger = round_.linger if failure is not None and round_.problem is None else 0
        again = max(self._progress.clock + linger, round_.meet_at)
        self._parts.schedule.not_before = max(self._parts.site.gather(again))

    def _record(self, round_: Round, committed: bool, failure: object | None, seconds: float) -> None:
        record = self._parts.exchange.record(
            round_,
            round=self._lineage.position.round,
            step=self._progress.clock,
            seconds_apply=seconds,
            healed=self._progress.healed,
            committed=committed,
            failure=failure,
        )
        self.ledger.add(record)
        if not committed:
            logger.warning("round after inner step %d was not committed: %s", self._progress.clock, record.error)
        if self._on_round is not None:
            self._on_round(record)
