"""One round's exchange: quorum, agreement, reduction. Knows nothing of methods or of how results are applied."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import ReduceOp

from titan_ext.semi_sync.agreement import agree
from titan_ext.semi_sync.ledger import RoundRecord
from titan_ext.semi_sync.manager import ReplicaManager, wire_device
from titan_ext.semi_sync.pairing import Pairing
from titan_ext.semi_sync.plan import PARAMETERS
from titan_ext.semi_sync.reduction import Reduction
from titan_ext.semi_sync.synced import SyncedRow

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Round:
    """A round from launch to landing."""

    intent: list[int] | None
    """Indices of the rows this site means to exchange; None while joining."""
    clock: int
    """Inner step of the launch."""
    weight: float
    """This site's weight in the mean; 0 contributes nothing."""
    rows: list[int] = field(default_factory=list)
    """The rows all sites agreed on."""
    buffer: torch.Tensor | None = None
    """fp32: the rows one after the other."""
    trailer: torch.Tensor | None = None
    """fp32 ``[2]``: the sum of the weights and the number of contributors."""
    lost: dict[int, torch.Tensor] = field(default_factory=dict)
    """By row: what the reduction took away from this site's contribution."""
    silent: set[int] = field(default_factory=set)
    """Rows for which this site had nobody to exchange with."""
    sites: int = 0
    seconds_quorum: float = 0.0
    seconds_reduce: float = 0.0
    problem: str | None = None

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the sites that contributed."""
        return float(self.trailer[0]) if self.trailer is not None else 0.0

    @property
    def participants(self) -> int:
        """Sites that contributed."""
        return round(float(self.trailer[1])) if self.trailer is not None else 0


class Exchange:
    """Runs rounds over a manager, on the caller's thread or on another one.

    Args:
        manager: this rank's replica manager.
        rows: the plan's rows bound to this rank.
        fingerprint: equal at sites that may exchange.
        reduction: how a row is summed over the sites.
        pairing: which ranks do so with which.
        all_of_site: whether something holds on every rank of the site; a collective.
        error_feedback: add what the codec lost to the next contribution of the row.
        device: where buffers live.
    """

    def __init__(
        self,
        manager: ReplicaManager,
        rows: Sequence[SyncedRow],
        *,
        fingerprint: int,
        reduction: Reduction,
        pairing: Pairing,
        all_of_site: Callable[[bool], bool],
        error_feedback: bool,
        device: torch.device,
    ) -> None:
        self._manager = manager
        self._rows = rows
        self._fingerprint = fingerprint
        self._reductions = [row.reduction or reduction for row in rows]
        self._pairing = pairing
        self._all_of_site = all_of_site
        self._device = device
        self._residuals = {
            index: torch.zeros(row.numel, device=device)
            for index, row in enumerate(rows)
            if error_feedback and row.reduction is None
        }

    def fill(self, round_: Round) -> None:
        """Write this site's weighted contribution for ``round_.rows`` into a fresh buffer."""
        numel = sum(self._rows[index].numel for index in round_.rows)
        if round_.weight <= 0:
            round_.buffer = torch.zeros(numel, dtype=torch.float32, device=self._device)
            round_.trailer = torch.zeros(2)
            return
        round_.buffer = torch.empty(numel, dtype=torch.float32, device=self._device)
        round_.trailer = torch.tensor([round_.weight, 1.0])
        for index, part in self.parts(round_):
            self._rows[index].write(part, round_.clock)
            if round_.weight != 1.0:
                part.mul_(round_.weight)
            if index in self._residuals:
                part.add_(self._residuals[index])
        if not self._all_of_site(_is_finite(round_.buffer)):
            # One NaN would reach every site. What the others agree on comes back and heals this one.
            logger.warning(
                "this site's contribution after inner step %d is not finite; it is left out of the round", round_.clock
            )
            round_.weight = 0.0
            round_.buffer.zero_()
            round_.trailer.zero_()

    def settle(self, round_: Round) -> None:
        """Call when a round is committed: what the reduction lost of it belongs to the next one."""
        for index, lost in round_.lost.items():
            if self._rows[index].takes_lost:
                self._rows[index].take_lost(lost)
            else:
                self._residuals[index] = lost

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
        wire = 0
        if round_.seconds_reduce:
            travelled = [index for index in round_.rows if index not in round_.silent]
            for run in self._together(travelled):
                wire += self._pairing.wire_bytes(self._reductions[run[0]], run, round_.sites)
        return RoundRecord(
            rows=[self._rows[index].row.key for index in round_.rows],
            participants=round_.participants if committed else 0,
            sites=round_.sites,
            bytes_sent=wire,
            bytes_received=wire,
            seconds_quorum=round_.seconds_quorum,
            seconds_reduce=round_.seconds_reduce,
            committed=committed,
            error=None if committed else str(round_.problem or failure or "a rank or site of the round failed"),
            **measured,
        )

    def parts(self, round_: Round) -> list[tuple[int, torch.Tensor]]:
        """Row index and its slice of the buffer, for every row of the round."""
        parts, start = [], 0
        for index in round_.rows:
            end = start + self._rows[index].numel
            parts.append((index, round_.buffer[start:end]))
            start = end
        return parts

    def describe(self, round_: Round) -> dict[str, Any]:
        """A reduced round without its tensors, as JSON values."""
        return {
            "rows": [self._rows[index].row.key for index in round_.rows],
            "clock": round_.clock,
            "weight": round_.weight,
            "sites": round_.sites,
            "trailer": round_.trailer.tolist(),
        }

    def residual_state(self, flight: Round | None) -> dict[str, dict[str, torch.Tensor]]:
        """What the codec has lost so far, by row and parameter. It is this site's alone.

        Args:
            flight: a reduced round that has not landed; what it lost counts as settled.
        """
        lost = flight.lost if flight is not None else {}
        return {
            self._rows[index].row.key: self._rows[index].named_parts(lost.get(index, flat))
            for index, flat in self._residuals.items()
        }

    def load_residual_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore what ``residual_state`` returned."""
        for index, flat in self._residuals.items():
            self._rows[index].fill_from_parts(flat, state[self._rows[index].row.key])

    def checkpoint_state(self, round_: Round | None) -> dict[str, dict[str, torch.Tensor]]:
        """Reduced values of every row that can be in flight, zeros where nothing is.

        A checkpoint is loaded into the tensors of a fresh object, so the keys may not depend on the moment.
        """
        parts = dict(self.parts(round_)) if round_ is not None else {}
        return {
            row.row.key: row.named_parts(parts.get(index, torch.zeros(row.numel, device=row.device)))
            for index, row in enumerate(self._rows)
            if row.row.delay
        }

    def restore(self, description: Mapping[str, Any], state: Mapping[str, Any]) -> Round:
        """The reduced round that ``describe`` and ``checkpoint_state`` told of."""
        keys = [row.row.key for row in self._rows]
        rows = [keys.index(key) for key in description["rows"]]
        round_ = Round(intent=rows, clock=description["clock"], weight=0.0, rows=rows, sites=description["sites"])
        self.fill(round_)
        for index, part in self.parts(round_):
            self._rows[index].fill_from_parts(part, state[keys[index]])
        round_.trailer = torch.tensor(description["trailer"])
        round_.weight = description["weight"]
        return round_

    def run(self, round_: Round, before_reduce: Callable[[], None]) -> Round:
        """Quorum, agreement and reduction; errors end up in ``round_.problem``, never as exceptions
        of the wire.

        Args:
            round_: filled already if its rows are in flight while the inner loop goes on.
            before_reduce: called once the round is agreed, before the buffer is written, to take in
                the state of a peer if this site was behind.
        """
        started = time.perf_counter()
        self._manager.start_quorum()
        round_.sites = self._manager.num_participants()
        outcome = agree(
            self._manager,
            fingerprint=self._fingerprint,
            clock=round_.clock,
            rows=round_.intent,
            num_rows=len(self._rows),
        )
        round_.seconds_quorum = time.perf_counter() - started
        if outcome.problem is not None:
            self._manager.report_error(RuntimeError(outcome.problem))
            round_.problem = outcome.problem
            return round_
        before_reduce()
        rows = outcome.rows
        if outcome.newcomers and rows:
            rows = self._with_moments(rows)
        self._take(round_, rows, outcome.clock)
        if round_.rows and self._manager.errored() is None:
            self._reduce(round_)
        return round_

    def _with_moments(self, rows: list[int]) -> list[int]:
        """The rows of a round that takes in a newcomer: all states without a global value come along.

        Those are nowhere whole but in the mean over the members, and a newcomer that started from
        zero would pull the next mean down.
        """
        if any(self._rows[index].row.delay for index in rows):
            return rows  # written already, and the inner loop is changing the moments
        moments = [index for index, row in enumerate(self._rows) if row.row.state != PARAMETERS]
        return sorted({*rows, *moments})

    def _take(self, round_: Round, rows: list[int], clock: int) -> None:
        round_.clock = clock
        round_.rows = rows
        if round_.intent is None:
            # Taken in by the members: what this site did before is not measured from their point.
            round_.weight = 0.0
            round_.buffer = None
        if rows and round_.buffer is None:
            self.fill(round_)

    def _reduce(self, round_: Round) -> None:
        started = time.perf_counter()
        round_.trailer = round_.trailer.to(wire_device(self._manager))
        trailer = self._manager.allreduce(round_.trailer, reduce_op=ReduceOp.SUM)
        parts = dict(self.parts(round_))
        for rows in self._together(round_.rows):
            values = self._joined(round_.buffer, [parts[index] for index in rows])
            wanted = [index for index in rows if index in self._residuals or self._rows[index].takes_lost]
            lost = torch.empty_like(values) if wanted and round_.weight > 0 else None
            travelled = self._pairing.reduce(
                self._reductions[rows[0]],
                self._manager,
                [self._rows[index] for index in rows],
                values,
                clock=round_.clock,
                lost=lost,
            )
            round_.silent |= set() if travelled else set(rows)
            if lost is not None:
                sizes = [parts[index].numel() for index in rows]
                round_.lost |= {index: part for index, part in zip(rows, lost.split(sizes)) if index in wanted}
        trailer.wait()
        round_.seconds_reduce = time.perf_counter() - started

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
