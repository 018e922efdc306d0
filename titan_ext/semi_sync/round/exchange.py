"""One round's exchange: quorum, agreement, healing, reduction. Knows nothing of methods or of how results are applied."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.distributed import ReduceOp, Work

from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.rule import PARAMETERS
from titan_ext.semi_sync.plan.weighting import SiteWeighting
from titan_ext.semi_sync.round.agreement import SiteStatus, Verdict, agree, send_status
from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.round.contributions import Contribution, Contributions, ContributionTable, Sum
from titan_ext.semi_sync.round.differences import InCommon, name_differences
from titan_ext.semi_sync.round.healing import Healing
from titan_ext.semi_sync.round.late import discounted, late_contribution
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.round.newcomers import places_of_givers
from titan_ext.semi_sync.round.round import Launch, Role, RoundResult
from titan_ext.semi_sync.round.spans import span
from titan_ext.semi_sync.round.writing import ContributionWriter
from titan_ext.semi_sync.site.pairing import Pairing
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.moment_ages import Ages
from titan_ext.semi_sync.state.synced_state import SyncedState, TakenFromPeers, Tells
from titan_ext.semi_sync.wire.collectives import Traffic
from titan_ext.semi_sync.wire.manager import QuorumWire, ReplicaManager, SentBytes, StandingQuorum
from titan_ext.semi_sync.wire.reductions import Reduction, RoundFacts, reduced_together

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Runs rounds over a manager, on the caller's thread or on another one.

    Hazard: messages of one tag are matched by their order alone. All sites issue the collectives of a round in the
    order of ``run``, and skip the same ones: what decides is the table of statuses, equal at all sites.
    """

    manager: ReplicaManager
    states: Sequence[SyncedState]
    """The plan's rules bound to this rank."""
    in_common: InCommon
    """Equal at sites that may exchange."""
    lineage: Lineage
    healing: Healing
    writer: ContributionWriter
    """Of this site's contributions."""
    reductions: Sequence[Reduction]
    """How each state is summed over the sites."""
    pairing: Pairing
    """Which ranks exchange with which."""
    site: SiteRanks
    plan: SyncPlan
    """What the sites have in common."""
    weighting: SiteWeighting
    """How much each site counts."""
    wire: torch.device
    """Where a message has to lie for the manager."""
    groups: tuple[str, ...] = ()
    """Keys of the labels by which some rules are shared."""
    labels: tuple[int, ...] = ()
    """For each of them the number of this site's label."""
    at_one_commit: bool = False
    """Whether its rounds heal nobody, as those of a region: then its sites stand at one commit, or none is exchanged."""
    heartbeat_timeout_seconds: float = 0.0
    """After which a site that says nothing counts as dead."""
    clock: Clock = field(default_factory=Clock)
    """What rounds are timed by."""
    _retry_after_steps: int = field(default=0, init=False)
    """From the last table of statuses that came whole."""
    _bytes_sent: SentBytes = field(default=SentBytes(), init=False)
    """Of this rank when it was last taken."""
    _weighing_seconds: float = field(default=0.0, init=False)
    """In which it has waited for the others' weights since then."""

    def run(self, launch: Launch, contribution: Contribution | None = None) -> RoundResult:
        """Exchange a round. Errors end up in the verdict's ``problem`` or at the manager, never as exceptions of the wire.

        Where the last round was committed it is exchanged with its sites at once, while the lighthouse is asked; the quorum
        that comes then confirms that, or all is done again with its own sites.

        Args:
            launch: what this site means to do.
            contribution: this site's, where the inner loop goes on meanwhile and changes the parameters. The ranks of
                the site may not meet then, and a peer's state is taken in when the round is applied.
        """
        started = self.clock.now()
        last = self.manager.standing_quorum() if self._may_go_ahead(launch, contribution) else None
        if last is None:
            with span("quorum"):
                self.manager.start_quorum()
        else:
            result = self._run_ahead(last, launch, contribution, started)
            if result is not None:
                return result
        seconds_waiting = self.clock.now() - started
        # A peer's state comes with the quorum.
        role = Role.HEALED if self.healing.is_behind else launch.role
        role = Role.LATE if self.healing.is_late else role
        abstains = role.abstains
        with span("agree"):
            verdict = self._verdict(self.manager, send_status(self.manager, self._status(launch, role), self.wire)())
        result = RoundResult(
            launch=launch,
            role=role,
            sites=self.manager.num_participants(),
            verdict=verdict,
            retry_after_steps=self._retry_after_steps,
            seconds_waiting=seconds_waiting,
            seconds_quorum=self.clock.now() - started,
        )
        if contribution is None:
            with span("heal"):
                ready, healed = self.healing.take_in(launch, verdict)
            result = replace(result, healed=healed)
            if not ready:
                return result
        if self.manager.errored() is not None:
            return result
        rules = verdict.rules
        if verdict.newcomers:
            result, rules = replace(result, taken_over=self._bring_tables(verdict)), self._with_moments(rules)
        if not rules:
            return result
        if role is Role.LATE:
            contribution = late_contribution(launch, verdict, contribution, self.writer.write)
        elif contribution is None or abstains:
            # Taken in by the members: what this site did before is not measured from their point.
            weight = 0.0 if abstains else launch.weight
            contribution = self.writer.write(rules, verdict.step, weight, launch.standing)
        contribution = discounted(contribution, self.plan.lateness, launch.staleness, self.healing.missed)
        if self.manager.errored() is None:
            with span("reduce"):
                told = self._tell(self.manager, contribution)
                result = replace(result, sum=self._reduce(self.manager, contribution, told, verdict))
        return result

    def _may_go_ahead(self, launch: Launch, contribution: Contribution | None) -> bool:
        """Whether this round's messages are known without its quorum; equal at all ranks of the site."""
        if launch.role not in (Role.MEMBER, Role.SITTING_OUT) or not launch.rules:
            return False
        if any(self.reductions[rule].sums_over_ranks for rule in launch.rules) and not self.site.alone:
            return False
        if any(rule.apply.keeps_private for rule in self.plan.rules):
            return False  # what is noised anew where another quorum comes would be told twice
        if contribution is not None:
            return not launch.staleness  # discounted by it once
        # Where sites train on, they come to a round at different steps, and what some write depends on the round's.
        return not self.plan.lateness.trains_on

    def _run_ahead(
        self, last: StandingQuorum, launch: Launch, written: Contribution | None, started: float
    ) -> RoundResult | None:
        """The round with the sites of the last quorum; None if the quorum that has come meanwhile is another one.

        Hazard: the reduction overwrites a contribution. One that is written already, and could not be once more, waits for
        the quorum before it.

        Hazard: before that is known the ranks of the site meet for the contribution alone, whatever the wire does: one that
        fails at one rank must not leave the others waiting.
        """
        if not last.ask(self.clock.now):
            return None
        with span("agree"):
            statuses = send_status(last, self._status(launch, launch.role, ahead=True), self.wire)
        if written is None:
            # In the order in which a table of statuses names them.
            own = self.writer.write(sorted(launch.rules), launch.step, launch.weight, launch.standing)
            contribution = discounted(own, self.plan.lateness, launch.staleness, {})
        else:
            contribution = written
        told = self._tell(last, contribution)
        with span("agree"):
            verdict = self._verdict(last, statuses())
        if written is not None:
            with span("quorum"):
                last.wait()
            if not last.stands:
                return None
        agreed_at, summed = self.clock.now(), None
        if last.errored() is None:
            with span("reduce"):
                summed = self._reduce(last, contribution, told, verdict)
        with span("quorum"):
            arrived_at = last.wait()
        if not last.stands:
            return None
        error = last.errored()
        if self.manager.errored() is None and (error is not None or self.healing.is_behind):
            behind = RuntimeError("this site is behind, and the round had begun before the quorum told so")
            self.manager.report_error(error or behind)
        known_at = max(agreed_at, arrived_at)
        return RoundResult(
            launch=launch,
            role=launch.role,
            sites=last.num_participants(),
            verdict=verdict,
            retry_after_steps=self._retry_after_steps,
            seconds_waiting=arrived_at - started,
            seconds_quorum=known_at - started,
            sum=summed and replace(summed, seconds=self.clock.now() - known_at),
        )

    def complete(self, summed: Sum) -> None:
        """Let ranks that hold the same give each other the parts that each has summed.

        Hazard: call it where all ranks of the site know that none of them has met an error.
        """
        self.pairing.share_parts(summed.in_parts)

    def farewell(self) -> None:
        """Wait until all sites of the quorum come here: call it before the connections close.

        What the others still have to read of the last round lies in them; were they closed now, some systems would throw
        it away.
        """
        self.manager.allreduce(torch.zeros(1, device=self.wire), reduce_op=ReduceOp.SUM).wait()

    def take_bytes(self) -> dict[str, Any]:
        """What went over the wire since the last call, by the ledger's names. A collective over the site.

        Returns:
            bytes of all its ranks, and the seconds for which this one waited for messages.
        """
        transfers = [state.transfer for state in self.states if isinstance(state, TakenFromPeers)]
        once = {id(reduction): reduction for reduction in [*self.reductions, *transfers]}
        values = sum((reduction.take_traffic() for reduction in once.values()), Traffic())
        now, before = self.manager.bytes_sent, self._bytes_sent
        self._bytes_sent = now
        seconds, self._weighing_seconds = values.seconds + self._weighing_seconds, 0.0
        own = {
            "bytes_sent": values.sent,
            "bytes_received": values.received,
            "control_bytes_sent": now.control - before.control,
            "wire_bytes_sent": now.frames + now.healing - before.frames - before.healing,
            "healing_bytes_sent": now.healing - before.healing,
        }
        ranks = self.site.gather(own)
        return {name: sum(rank[name] for rank in ranks) for name in own} | {"seconds_transfer": seconds}

    # -- who, and what -----------------------------------------------------------------------------

    def _status(self, launch: Launch, role: Role, ahead: bool = False) -> SiteStatus:
        return SiteStatus(
            fingerprint=self.in_common.number(),
            step=launch.step,
            rules=None if role.abstains else list(launch.rules),
            late=role is Role.LATE,
            ahead=ahead,
            tokens=launch.tokens,
            step_time_ms=launch.step_time_ms,
            pace=launch.pace,
            done=launch.done,
            closes=launch.closes,
            labels=self.labels,
            sources=launch.sources,
            **self.lineage.status_fields(),
        )

    def _verdict(self, quorum: QuorumWire, table: list[SiteStatus]) -> Verdict:
        """What a table of statuses, this site's alone after an error, comes to; errors are the quorum's."""
        if quorum.errored() is not None:
            return Verdict(table, [], table[0].step)
        rank, in_step = quorum.participating_rank(), not self.plan.lateness.trains_on
        verdict = agree(table, rank, in_step=in_step, at_one_commit=self.at_one_commit)
        if verdict.settings_differ:
            # From one table: all sites meet in these collectives, or none does.
            named = name_differences(quorum, self.in_common, table)
            verdict = replace(verdict, problem=f"{verdict.problem}: {named}" if named else verdict.problem)
        self._retry_after_steps = verdict.steps_until_forgotten(self.heartbeat_timeout_seconds)
        if verdict.problem is None and verdict.all_join:
            opening = self.lineage.opening(quorum, table, self.wire)
            waits = opening is None and quorum.errored() is None
            verdict = replace(verdict, opening=opening, problem=self.lineage.why_waiting(table) if waits else None)
        if verdict.problem is not None:
            quorum.report_error(RuntimeError(verdict.problem))
        return verdict

    def _bring_tables(self, verdict: Verdict) -> dict[int, list[torch.Tensor]]:
        """To the newcomers what they take over, each value from the site that is furthest of those that hold it."""
        taken_over = {}
        for index, state in enumerate(self.states):
            if isinstance(state, TakenFromPeers):
                of = self._facts(self.manager, verdict, places_of_givers(verdict, self.groups, state.rule.group))
                if state.rule.group and all(of.weights[rank] >= 0 for rank in of.members(state.rule.group)):
                    continue
                if not of.weights:
                    continue  # all hold what the last commit left
                messages = state.offered()
                for message in messages:
                    self.pairing.reduce(state.transfer, self.manager, [state], message, of, None)
                if not state.rule.group or of.weights[of.rank] < 0:
                    taken_over[index] = messages
        return taken_over

    def _facts(self, quorum: QuorumWire, verdict: Verdict, weights: Sequence[float]) -> RoundFacts:
        labels, rank = verdict.labels(self.groups), quorum.participating_rank()
        return RoundFacts(verdict.step, weights, rank=rank, labels=labels, now=self.clock.now)

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

    def _tell(self, quorum: QuorumWire, contribution: Contribution) -> "_Told":
        """Tell the other sites what this one puts in and how old its moments are. A collective over the site."""
        states = [self.states[index] for index in contribution.parts]
        table = ContributionTable(contribution, states, self.site.gather)
        sites = quorum.num_participants()
        lines = table.line(quorum.participating_rank(), sites).to(self.wire)
        return _Told(table, lines, quorum.allreduce(lines, reduce_op=ReduceOp.SUM) if sites > 1 else None)

    def _reduce(self, quorum: QuorumWire, contribution: Contribution, told: "_Told", verdict: Verdict) -> Sum:
        started = self.clock.now()
        contribution, contributions, ages = self._weigh(quorum, contribution, told, verdict)
        of = self._facts(quorum, verdict, contributions.weights)
        parts = contribution.parts
        residuals: dict[int, torch.Tensor] = {}
        in_parts: list[torch.Tensor] = []
        for run in reduced_together(list(parts), self.reductions):
            values = _stretch(contribution.buffer, [parts[index] for index in run])
            wanted = [index for index in run if self.writer.error_feedback.takes(index)]
            residual = torch.empty_like(values) if wanted else None
            states = [self.states[index] for index in run]
            in_parts += self.pairing.reduce(self.reductions[run[0]], quorum, states, values, of, residual)
            if residual is not None:
                # Of one contribution of weight 1: the next one may weigh more or less than this. A site without weight
                # has lost nothing of its own, but maybe of sums that it coded.
                within = contributions.within(states[0].rule.group)
                usual = within.total_weight / max(1, len(within.contributors))
                factor = contribution.weight or usual or 1.0
                if factor != 1.0:
                    residual.div_(factor)
                pieces = residual.split([parts[index].numel() for index in run])
                residuals |= {index: part for index, part in zip(run, pieces, strict=True) if index in wanted}
        return Sum(
            parts=parts,
            weight=contribution.weight,
            own_is_finite=contribution.is_finite,
            contributions=contributions,
            residuals=residuals,
            remembered=contributions.remembered.get(quorum.participating_rank()),
            in_parts=tuple(in_parts),
            ages=ages,
            seconds=self.clock.now() - started,
        )

    def _weigh(
        self, quorum: QuorumWire, contribution: Contribution, told: "_Told", verdict: Verdict
    ) -> tuple[Contribution, Contributions, Ages]:
        """Learn what every site puts in and how old its moments are, hold back what is out of all proportion, and weigh."""
        rank, table, lines = quorum.participating_rank(), told.table, told.lines
        if told.work is not None:
            started = self.clock.now()
            told.work.wait()
            self._weighing_seconds += self.clock.now() - started
        contributions, outliers, ages = table.read(lines, self.writer.guard, rank, verdict.labels(self.groups))
        for site, factors in outliers.items():
            logger.warning(
                "site %s: its update after inner step %d is %.3g times the largest that its peers' median allows; %s",
                verdict.name(site),
                verdict.step,
                1 / min(factors) if min(factors) > 0 else math.inf,
                "left out" if self.writer.guard.action == "drop" else "clipped",
            )
        if rank in outliers and self.writer.guard.action == "drop":
            dropped = self.writer.nothing(contribution.buffer, contribution.parts)
            contribution = replace(dropped, is_finite=contribution.is_finite)
        elif rank in outliers:
            self.writer.clip(contribution, outliers[rank])
        factor = contributions.weigh(self.weighting).get(rank, 1.0)
        if factor != 1.0:
            contribution.buffer.mul_(factor)
            contribution = replace(contribution, weight=contribution.weight * factor)
        heard = table.told(lines, contributions)
        for index, part in contribution.parts.items():
            state = self.states[index]
            if isinstance(state, Tells):
                state.heed(part, heard, contribution.weight)
        return contribution, contributions, ages


class _Told(NamedTuple):
    """What this site has told the others of its contribution."""

    table: ContributionTable
    lines: torch.Tensor
    """Of all sites, once the work is done."""
    work: Work | None
    """None where there is no other site."""


def _stretch(buffer: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The stretch of the buffer that the neighbouring parts make up."""
    start = parts[0].storage_offset() - buffer.storage_offset()
    return buffer[start : start + sum(part.numel() for part in parts)]
