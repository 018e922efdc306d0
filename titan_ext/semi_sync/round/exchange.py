"""One round's exchange: quorum, agreement, healing, reduction. Knows nothing of methods or of how results are applied."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch.distributed import ReduceOp
from torch.profiler import record_function

from titan_ext.semi_sync.plan.plan import PARAMETERS, OutlierGuard
from titan_ext.semi_sync.round.age_table import AgeTable
from titan_ext.semi_sync.round.agreement import Verdict, agree
from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.round.contributions import Contributions
from titan_ext.semi_sync.round.error_feedback import ErrorFeedback
from titan_ext.semi_sync.round.healing import Healing
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.round.round import Contribution, Launch, Role, RoundResult, Sum, parts_of
from titan_ext.semi_sync.round.site_status import SiteStatus, all_gather_status
from titan_ext.semi_sync.site.pairing import Pairing
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.moment_ages import Ages
from titan_ext.semi_sync.state.sparse_tables import SparseTable
from titan_ext.semi_sync.state.synced_state import Adoptable, Guarded, SyncedState
from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device
from titan_ext.semi_sync.wire.reductions import Reduction, RoundFacts

logger = logging.getLogger(__name__)

TakeIn = Callable[[Launch, Verdict], tuple[bool, bool]]
"""Called once this rank knows the round: whether all ranks of the site do, and whether a peer's state was taken in."""


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Runs rounds over a manager, on the caller's thread or on another one.

    Hazard: Gloo matches the collectives of two sites by their order alone. All sites issue those of a round in the
    order of ``run``, and skip the same ones: what decides is the table of statuses, equal at all sites.
    """

    manager: ReplicaManager
    states: Sequence[SyncedState]
    """The plan's rules bound to this rank."""
    fingerprint: int
    """Equal at sites that may exchange."""
    lineage: Lineage
    healing: Healing
    error_feedback: ErrorFeedback
    reductions: Sequence[Reduction]
    """How each state is summed over the sites."""
    pairing: Pairing
    """Which ranks exchange with which."""
    site: SiteRanks
    guard: OutlierGuard
    device: torch.device
    """Where buffers live."""
    heartbeat_timeout_seconds: float = 0.0
    """After which a site that says nothing counts as dead."""
    clock: Clock = field(default_factory=Clock)
    """What rounds are timed by."""
    _retry_after_steps: int = field(default=0, init=False)
    """From the last table of statuses that came whole."""

    def run(
        self, launch: Launch, contribution: Contribution | None = None, take_in: TakeIn | None = None
    ) -> RoundResult:
        """Exchange a round. Errors end up in the verdict's ``problem`` or at the manager, never as exceptions of the wire.

        Args:
            launch: what this site means to do.
            contribution: this site's, where the inner loop goes on meanwhile and the parameters change.
            take_in: takes in a peer's state if this site was behind. None where the inner loop goes on meanwhile: the
                ranks of the site may not meet then, and a state is taken in when the round is applied.
        """
        started = self.clock.now()
        with record_function("titan_ext::quorum"):
            self.manager.start_quorum()
        # A peer's state comes with the quorum.
        role = Role.HEALED if self.healing.is_behind else launch.role
        with record_function("titan_ext::agree"):
            verdict = self._verdict(launch, role)
        result = RoundResult(
            launch=launch,
            role=role,
            sites=self.manager.num_participants(),
            verdict=verdict,
            retry_after_steps=self._retry_after_steps,
            seconds_quorum=self.clock.now() - started,
        )
        if take_in is not None:
            with record_function("titan_ext::heal"):
                ready, healed = take_in(launch, verdict)
            result = replace(result, healed=healed)
            if not ready:
                return result
        if self.manager.errored() is not None:
            return result
        if verdict.newcomers:
            result = replace(result, adopted=self._bring_tables(verdict))
        rules = self._with_moments(verdict.rules) if verdict.newcomers else verdict.rules
        if not rules:
            return result
        if contribution is None or role.abstains:
            # Taken in by the members: what this site did before is not measured from their point.
            contribution = self.contribution(rules, verdict.step, 0.0 if role.abstains else launch.weight)
        if self.manager.errored() is None:
            with record_function("titan_ext::reduce"):
                result = replace(result, sum=self._reduce(contribution, verdict))
        return result

    def contribution(self, rules: Sequence[int], step: int, weight: float) -> Contribution:
        """This site's weighted contribution to the rules of a round, in a fresh buffer. A collective over the site."""
        for state in self.states:
            state.check()
        rules, numel = tuple(rules), sum(self.states[index].numel for index in rules)
        if weight <= 0:
            return self._nothing(rules, torch.empty(numel, dtype=torch.float32, device=self.device))
        buffer = torch.empty(numel, dtype=torch.float32, device=self.device)
        squares = []
        with record_function("titan_ext::contribution"):
            for index, part in parts_of(buffer, rules, self.states):
                state = self.states[index]
                state.write(part, step)
                if self._is_guarded(state):
                    squares.append(state.update_norm(part) ** 2)
                self.error_feedback.add(index, part)
                if weight != 1.0:
                    part.mul_(weight)
        by_rank = self.site.gather((_is_finite(buffer), squares))
        norms = [math.sqrt(sum(ranks)) for ranks in zip(*(each for _, each in by_rank), strict=True)]
        if all(finite for finite, _ in by_rank):
            return Contribution(rules, weight, buffer, norms)
        # One NaN would reach every site. What the others agree on comes back and heals this one.
        logger.warning("this site's contribution after inner step %d is not finite; it is left out of the round", step)
        return replace(self._nothing(rules, buffer), is_finite=False)

    def bytes_sent(self, result: RoundResult) -> int:
        """Bytes that all ranks of the site sent in the round's reductions. A collective over the site."""
        return self._measured_bytes() + self._computed_bytes(result)

    # -- who, and what -----------------------------------------------------------------------------

    def _verdict(self, launch: Launch, role: Role) -> Verdict:
        own = SiteStatus(
            fingerprint=self.fingerprint,
            step=launch.step,
            rules=None if role.abstains else list(launch.rules),
            tokens=launch.tokens,
            step_time_ms=launch.step_time_ms,
            done=launch.done,
            **self.lineage.status_fields(),
        )
        table = all_gather_status(self.manager, own)
        if self.manager.errored() is not None:
            return Verdict([own], [], own.step)
        verdict = agree(table, self.manager.participating_rank())
        self._retry_after_steps = verdict.steps_until_forgotten(self.heartbeat_timeout_seconds)
        if verdict.problem is None and verdict.all_join:
            opening = self.lineage.opening(self.manager, table)
            waits = opening is None and self.manager.errored() is None
            verdict = replace(verdict, opening=opening, problem=self.lineage.why_waiting(table) if waits else None)
        if verdict.problem is not None:
            self.manager.report_error(RuntimeError(verdict.problem))
        return verdict

    def _bring_tables(self, verdict: Verdict) -> dict[int, list[torch.Tensor]]:
        """Rows of tables to the newcomers, each from the site that is furthest of those that hold it."""
        table = verdict.table
        if len({site.position for site in table}) == 1 and table[0].position.round > 0:
            return {}  # all hold what the last commit left
        ranks = range(len(table))
        furthest = sorted(ranks, key=lambda rank: (table[rank].position, -rank), reverse=True)
        places = [float(furthest.index(rank)) for rank in ranks]
        adopted = {}
        for index, state in enumerate(self.states):
            if isinstance(state, Adoptable):
                adopted[index] = state.offered()
                for message in adopted[index]:
                    self.pairing.reduce(
                        state.adoption, self.manager, [state], message, RoundFacts(verdict.step, places), None
                    )
        return adopted

    def _with_moments(self, rules: list[int]) -> list[int]:
        """The rules of a round that takes in a newcomer: all states without a global value come along.

        Those are nowhere whole but in the mean over the members, and a newcomer that started from
        zero would pull the next mean down.
        """
        if not rules or any(self.states[index].rule.delay for index in rules):
            return rules  # written already, and the inner loop is changing the moments
        moments = [index for index, state in enumerate(self.states) if state.rule.state != PARAMETERS]
        return sorted({*rules, *moments})

    # -- the wire ----------------------------------------------------------------------------------

    def _reduce(self, contribution: Contribution, verdict: Verdict) -> Sum:
        started = self.clock.now()
        contribution, contributions, ages = self._weigh(contribution, verdict)
        of = RoundFacts(verdict.step, contributions.weights)
        parts = dict(parts_of(contribution.buffer, contribution.rules, self.states))
        residuals: dict[int, torch.Tensor] = {}
        without_partner: set[int] = set()
        for run in self._together(contribution.rules):
            values = _stretch(contribution.buffer, [parts[index] for index in run])
            wanted = [index for index in run if self.error_feedback.takes(index)]
            residual = torch.empty_like(values) if wanted else None
            states = [self.states[index] for index in run]
            if not self.pairing.reduce(self.reductions[run[0]], self.manager, states, values, of, residual):
                without_partner |= set(run)
            if residual is not None:
                # Of one contribution of weight 1: the next one may weigh more or less than this. A site without weight
                # has lost nothing of its own, but maybe of sums that it coded.
                usual = contributions.total_weight / max(1, len(contributions.contributors))
                residual.div_(contribution.weight or usual or 1.0)
                pieces = residual.split([parts[index].numel() for index in run])
                residuals |= {index: part for index, part in zip(run, pieces, strict=True) if index in wanted}
        return Sum(
            rules=contribution.rules,
            buffer=contribution.buffer,
            weight=contribution.weight,
            own_is_finite=contribution.is_finite,
            contributions=contributions,
            residuals=residuals,
            ages=ages,
            without_partner=frozenset(without_partner),
            seconds=self.clock.now() - started,
        )

    def _weigh(self, contribution: Contribution, verdict: Verdict) -> tuple[Contribution, Contributions, Ages]:
        """Learn what every site puts in and how old its moments are, and hold back what is out of all proportion."""
        rank, sites = self.manager.participating_rank(), self.manager.num_participants()
        table = AgeTable([self.states[index] for index in contribution.rules], self.site.gather)
        own = Contributions.own(rank, sites, contribution.weight, contribution.norms)
        both = torch.cat([own, table.columns(rank, sites)], dim=1).to(wire_device(self.manager))
        self.manager.allreduce(both, reduce_op=ReduceOp.SUM).wait()
        contributions = Contributions.of(both[:, : own.shape[1]])
        outliers = contributions.guard(self.guard.threshold, self.guard.action)
        ages = table.ages(both[:, own.shape[1] :], contributions.weights)
        for site, factors in outliers.items():
            logger.warning(
                "site %s: its update after inner step %d is %.3g times the largest that its peers' median allows; %s",
                verdict.name(site),
                verdict.step,
                1 / min(factors) if min(factors) > 0 else math.inf,
                "left out" if self.guard.action == "drop" else "clipped",
            )
        if rank in outliers and self.guard.action == "drop":
            dropped = self._nothing(contribution.rules, contribution.buffer)
            contribution = replace(dropped, is_finite=contribution.is_finite)
        elif rank in outliers:
            self._clip(contribution, outliers[rank])
        return contribution, contributions, ages

    def _clip(self, contribution: Contribution, factors: Sequence[float]) -> None:
        parts: list[tuple[Any, torch.Tensor]] = [
            (self.states[index], part)
            for index, part in parts_of(contribution.buffer, contribution.rules, self.states)
            if self._is_guarded(self.states[index])
        ]
        for (state, part), factor in zip(parts, factors, strict=True):
            state.damp(part, factor, contribution.weight)

    def _is_guarded(self, state: SyncedState) -> TypeGuard[Guarded]:
        return isinstance(state, Guarded) and self.guard.threshold > 0

    def _nothing(self, rules: tuple[int, ...], buffer: torch.Tensor) -> Contribution:
        """Contribute nothing."""
        guarded = sum(self._is_guarded(self.states[index]) for index in rules)
        return Contribution(rules, 0.0, buffer.zero_(), [0.0] * guarded)

    def _measured_bytes(self) -> int:
        """Of tables shared by row, whose messages' sizes depend on who holds what. All ranks meet or none."""
        bound = zip(self.states, self.reductions, strict=True)
        tables = [(state, reduction) for state, reduction in bound if isinstance(state, SparseTable)]
        if not tables:
            return 0
        own = sum(reduction.take_sent() for _, reduction in tables)
        own += sum(state.adoption.take_sent() for state, _ in tables if isinstance(state, Adoptable))
        return sum(self.site.gather(own))

    def _computed_bytes(self, result: RoundResult) -> int:
        """Of everything else: it follows from sizes."""
        if result.sum is None:
            return 0
        travelled = [
            index
            for index in result.sum.rules
            if index not in result.sum.without_partner and not isinstance(self.states[index], SparseTable)
        ]
        return sum(
            self.pairing.wire_bytes(self.reductions[run[0]], run, result.sites) for run in self._together(travelled)
        )

    def _together(self, rules: Sequence[int]) -> list[list[int]]:
        """Neighbouring rules that are summed alike travel as one: fewer and fuller buckets."""
        runs: list[list[int]] = []
        for index in rules:
            if runs and self.reductions[runs[-1][0]] is self.reductions[index]:
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs


def record_fields(
    result: RoundResult, committed: bool, failure: object | None, states: Sequence[SyncedState]
) -> dict[str, Any]:
    """The fields of a ``RoundRecord`` that a round tells of itself.

    Args:
        result: after its vote.
        committed: whether it was applied.
        failure: the manager's error, if any.
        states: the plan's rules bound to this rank.
    """
    return {
        "rules": [states[index].key for index in result.rules],
        "participants": len(result.contributors) if committed else 0,
        "contributors": [result.verdict.name(rank) for rank in result.contributors] if committed else [],
        "sites": result.sites,
        "seconds_quorum": result.seconds_quorum,
        "seconds_reduce": result.sum.seconds if result.sum is not None else 0.0,
        "committed": committed,
        "healed": result.healed,
        "error": None if committed else str(result.verdict.problem or failure or "a rank or site of the round failed"),
    }


def _stretch(buffer: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The stretch of the buffer that the neighbouring parts make up."""
    start = parts[0].storage_offset() - buffer.storage_offset()
    return buffer[start : start + sum(part.numel() for part in parts)]


def _is_finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    low, high = torch.aminmax(values)  # NaN in, NaN out; and no copy
    return bool(torch.isfinite(low) & torch.isfinite(high))
