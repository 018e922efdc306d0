"""One round's exchange: quorum, agreement, reduction. Knows nothing of methods or of how results are applied."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.plan.plan import PARAMETERS
from titan_ext.semi_sync.round.agreement import Agreement, agree
from titan_ext.semi_sync.round.contributions import Contributions
from titan_ext.semi_sync.round.error_feedback import Residuals
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.round.round import Round
from titan_ext.semi_sync.round.site_status import Standing
from titan_ext.semi_sync.site.pairing import Pairing
from titan_ext.semi_sync.state.synced_state import SyncedRow
from titan_ext.semi_sync.wire.ledger import RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device
from titan_ext.semi_sync.wire.reductions import Reduction

logger = logging.getLogger(__name__)


class Exchange:
    """Runs rounds over a manager, on the caller's thread or on another one.

    Args:
        manager: this rank's replica manager.
        rows: the plan's rows bound to this rank.
        fingerprint: equal at sites that may exchange.
        lineage: the run and how far it has come.
        reductions: how each row is summed over the sites that has no way of its own.
        pairing: which ranks do so with which.
        gather: a value of every rank of the site, a collective.
        guard: above how many times the sites' median norm an update is an outlier (0: never), and what becomes of it.
        device: where buffers live.
        silence: seconds after which a site that says nothing counts as dead.
    """

    def __init__(
        self,
        manager: ReplicaManager,
        rows: Sequence[SyncedRow],
        *,
        fingerprint: int,
        lineage: Lineage,
        reductions: Sequence[Reduction],
        pairing: Pairing,
        gather: Callable[[Any], list[Any]],
        guard: tuple[float, Literal["clip", "drop"]],
        device: torch.device,
        silence: float = 0.0,
    ) -> None:
        self._manager = manager
        self._rows = rows
        self._fingerprint = fingerprint
        self._reductions = [row.reduction or each for row, each in zip(rows, reductions, strict=True)]
        self._pairing = pairing
        self._lineage = lineage
        self._gather = gather
        self._guard = guard
        self._device = device
        self._forgets_after = silence
        self._linger = 0
        self.residuals = Residuals(rows, device)

    def fill(self, round_: Round) -> None:
        """Write this site's weighted contribution for ``round_.rows`` into a fresh buffer."""
        numel = sum(self._rows[index].numel for index in round_.rows)
        if round_.weight <= 0:
            round_.buffer = torch.zeros(numel, dtype=torch.float32, device=self._device)
            round_.norms = [0.0] * len(self._guarded(round_.rows))
            return
        round_.buffer = torch.empty(numel, dtype=torch.float32, device=self._device)
        squares = []
        for index, part in round_.parts(self._rows):
            self._rows[index].write(part, round_.clock)
            if index in self._guarded(round_.rows):
                squares.append(self._rows[index].update_norm(part) ** 2)
            if round_.weight != 1.0:
                part.mul_(round_.weight)
            self.residuals.add(index, part)
        told = self._gather((_is_finite(round_.buffer), squares))
        round_.norms = [math.sqrt(sum(ranks)) for ranks in zip(*(each for _, each in told))]
        if not all(finite for finite, _ in told):
            # One NaN would reach every site. What the others agree on comes back and heals this one.
            logger.warning(
                "this site's contribution after inner step %d is not finite; it is left out of the round", round_.clock
            )
            self._silence(round_)

    def record(
        self, round_: Round, *, committed: bool, failure: object | None, **measured: Any
    ) -> RoundRecord:
        """What a round cost and what came of it.

        Args:
            round_: after its landing.
            committed: whether it was applied.
            failure: the manager's error, if any.
            **measured: the fields of the record that are not the round's own.
        """
        return RoundRecord(
            rows=[self._rows[index].row.key for index in round_.rows],
            participants=len(round_.contributors) if committed else 0,
            contributors=[round_.name(rank) for rank in round_.contributors] if committed else [],
            sites=round_.sites,
            bytes_sent=(wire := self._wire_bytes(round_)),
            bytes_received=wire,
            seconds_quorum=round_.seconds_quorum,
            seconds_reduce=round_.seconds_reduce,
            committed=committed,
            error=None if committed else str(round_.problem or failure or "a rank or site of the round failed"),
            **measured,
        )

    def run(self, round_: Round, all_ready: Callable[[Round], bool]) -> Round:
        """Quorum, agreement and reduction; errors end up in ``round_.problem`` or at the manager, never as
        exceptions of the wire.

        Args:
            round_: filled already if its rows are in flight while the inner loop goes on.
            all_ready: called once this rank knows the round, before the buffer is written: whether all ranks of the
                site do. Takes in the state of a peer if this site was behind.
        """
        started = time.perf_counter()
        self._manager.start_quorum()
        round_.sites = self._manager.num_participants()
        outcome = self._agreed(round_)
        round_.seconds_quorum = time.perf_counter() - started
        if not all_ready(round_) or self._manager.errored() is not None:
            round_.rows = round_.rows or list(round_.launched)
            return round_
        rows = outcome.rows
        if outcome.newcomers:
            self._bring_rows(round_)
        if outcome.newcomers and rows:
            rows = self._with_moments(rows)
        self._take(round_, rows)
        if round_.rows and self._manager.errored() is None:
            self._reduce(round_)
        return round_

    def _agreed(self, round_: Round) -> Agreement:
        own = Standing(
            fingerprint=self._fingerprint,
            clock=round_.clock,
            rows=round_.intent,
            tokens=round_.tokens,
            pace=round_.pace,
            **self._lineage.said(),
        )
        outcome = agree(self._manager, own)
        if self._manager.errored() is None:
            # From one table, so that all sites come to one step.
            slowest = max(site.pace for site in outcome.table)
            self._linger = math.ceil(1000 * self._forgets_after / slowest) if slowest else 0
        round_.table, round_.problem = outcome.table, outcome.problem
        round_.refused, round_.diverged = outcome.refused, outcome.diverged
        if round_.problem is None and self._manager.errored() is None and all(site.rows is None for site in outcome.table):
            round_.opening = self._lineage.opening(self._manager, outcome.table)
            if round_.opening is None and self._manager.errored() is None:
                round_.problem = self._lineage.why_waiting(outcome.table)
        if round_.problem is not None:
            self._manager.report_error(RuntimeError(round_.problem))
        else:
            round_.agreed, round_.clock = outcome.rows, outcome.clock
        round_.linger, round_.meet_at = self._linger, outcome.meet_at
        return outcome

    def _bring_rows(self, round_: Round) -> None:
        """Rows of tables, each from the site that is furthest of those that hold it, to the newcomers."""
        sites = range(len(round_.table))
        if len({site.position for site in round_.table}) == 1 and round_.table[0].position.round > 0:
            return  # all hold what the last commit left
        furthest = sorted(sites, key=lambda site: (round_.table[site].position, -site), reverse=True)
        places = [float(furthest.index(site)) for site in sites]
        for index, row in enumerate(self._rows):
            if row.adopts:
                messages = row.offered()
                for message in messages:
                    self._pairing.reduce(
                        row.adoption, self._manager, [row], message, clock=round_.clock, weights=places, lost=None
                    )
                round_.adopted[index] = messages

    def _with_moments(self, rows: list[int]) -> list[int]:
        """The rows of a round that takes in a newcomer: all states without a global value come along.

        Those are nowhere whole but in the mean over the members, and a newcomer that started from
        zero would pull the next mean down.
        """
        if any(self._rows[index].row.delay for index in rows):
            return rows  # written already, and the inner loop is changing the moments
        moments = [index for index, row in enumerate(self._rows) if row.row.state != PARAMETERS]
        return sorted({*rows, *moments})

    def _take(self, round_: Round, rows: list[int]) -> None:
        round_.rows = rows
        if round_.intent is None:
            # Taken in by the members: what this site did before is not measured from their point.
            round_.weight = 0.0
            round_.buffer = None
        if rows and round_.buffer is None:
            self.fill(round_)

    def _reduce(self, round_: Round) -> None:
        started = time.perf_counter()
        self._weigh(round_)
        parts = dict(round_.parts(self._rows))
        for rows in self._together(round_.rows):
            values = self._joined(round_.buffer, [parts[index] for index in rows])
            wanted = [index for index in rows if self.residuals.takes(index)]
            lost = torch.empty_like(values) if wanted and round_.weight > 0 else None
            travelled = self._pairing.reduce(
                self._reductions[rows[0]],
                self._manager,
                [self._rows[index] for index in rows],
                values,
                clock=round_.clock,
                weights=round_.contributions.weights,
                lost=lost,
            )
            round_.silent |= set() if travelled else set(rows)
            if lost is not None:
                sizes = [parts[index].numel() for index in rows]
                round_.lost |= {index: part for index, part in zip(rows, lost.split(sizes)) if index in wanted}
        round_.seconds_reduce = time.perf_counter() - started

    def _weigh(self, round_: Round) -> None:
        """Learn what every site puts in, and hold back what is out of all proportion."""
        rank = self._manager.participating_rank()
        table = Contributions.own(rank, round_.sites, round_.weight, round_.norms).to(wire_device(self._manager))
        self._manager.allreduce(table, reduce_op=ReduceOp.SUM).wait()
        round_.contributions = Contributions.of(table)
        threshold, action = self._guard
        outliers = round_.contributions.guard(threshold, action)
        for site, factors in outliers.items():
            logger.warning(
                "site %s: its update after inner step %d is %.3g times the largest that its peers' median allows; %s",
                round_.name(site),
                round_.clock,
                1 / min(factors),
                "left out" if action == "drop" else "clipped",
            )
        if rank not in outliers:
            return
        if action == "drop":
            self._silence(round_)
            return
        parts = dict(round_.parts(self._rows))
        for index, factor in zip(self._guarded(round_.rows), outliers[rank]):
            self._rows[index].damp(parts[index], factor, round_.weight)

    def _guarded(self, rows: Sequence[int]) -> list[int]:
        return [index for index in rows if self._rows[index].guarded] if self._guard[0] > 0 else []

    def _silence(self, round_: Round) -> None:
        """Contribute nothing."""
        round_.weight = 0.0
        round_.buffer.zero_()

    def _wire_bytes(self, round_: Round) -> int:
        if not round_.seconds_reduce:
            return 0
        travelled = [index for index in round_.rows if index not in round_.silent]
        total = 0
        for run in self._together(travelled):
            reduction = self._reductions[run[0]]
            if self._rows[run[0]].by_row:
                total += self._measured(reduction)
            else:
                total += self._pairing.wire_bytes(reduction, run, round_.sites)
        return total + sum(self._measured(row.adoption) for row in self._rows if row.adopts)

    def _measured(self, reduction: Reduction) -> int:
        """Bytes that all ranks of the site sent; a collective over it."""
        return sum(self._gather(reduction.take_sent()))

    def _together(self, rows: Sequence[int]) -> list[list[int]]:
        """Neighbouring rows that are summed alike travel as one: fewer and fuller buckets."""
        runs: list[list[int]] = []
        for index in rows:
            if runs and self._reductions[runs[-1][0]] is self._reductions[index]:
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs

    def _joined(self, buffer: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The stretch of the buffer that the neighbouring parts make up."""
        start = parts[0].storage_offset() - buffer.storage_offset()
        return buffer[start : start + sum(part.numel() for part in parts)]


def _is_finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    low, high = torch.aminmax(values)  # NaN in, NaN out; and no copy
    return bool(torch.isfinite(low) & torch.isfinite(high))
