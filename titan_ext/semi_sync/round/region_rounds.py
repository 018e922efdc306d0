"""Rounds of a region alone, over a quorum of its own: its sites agree, sum and vote, and no message leaves the region."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from titan_ext.semi_sync.compat.torchft_manager import adapt_manager
from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.semi_sync.plan.rule import averaged_by_all
from titan_ext.semi_sync.plan.schedule import Schedule
from titan_ext.semi_sync.round.agreement import Verdict
from titan_ext.semi_sync.round.commit import Committer, mean_is_finite_on_all_ranks, why_not_committed
from titan_ext.semi_sync.round.contributions import Sum
from titan_ext.semi_sync.round.exchange import Exchange
from titan_ext.semi_sync.round.healing import Healing
from titan_ext.semi_sync.round.launching import RoundLauncher
from titan_ext.semi_sync.round.round import Launch, RoundResult
from titan_ext.semi_sync.round.spans import span
from titan_ext.semi_sync.wire.ledger import RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device

logger = logging.getLogger(__name__)

# Equal at all sites and above 0: so torchft finds nobody behind, and nobody at the very beginning.
_COUNTERS = {"step": 1, "batches_committed": 0}


class RegionRounds:
    """The averages of ``region_sync_every`` among the sites of one region: of parameters, or of each step's gradients.

    The sites average that stand at one commit of the run and at one inner step. What all sites share stays as it is, so a
    round of a region is no commit of the run, and who misses one is not behind. A site that dies fails the rounds of its own
    region, and the next one of all sites. One that comes back takes the shared state in a round of all sites, and meets its
    region from then on.

    Hazard: no site may wait in one quorum for a site that waits for it in the other. So it comes to a round of its region at the
    inner steps at which one is due and at no other, whatever became of the last one, and so it does with rounds of all sites
    (``Schedule``). Sites that meet at different inner steps, as after one has joined, meet again at the first step that is
    ahead of all of them.

    Args:
        committer: of the rounds of all sites, with their parts.
        launcher: of this rank's rounds.
        make_manager: this rank's manager of the region's quorum, None where its leader speaks for it; see ``SiteOptions``.
    """

    def __init__(
        self, committer: Committer, launcher: RoundLauncher, make_manager: Callable[[int], ReplicaManager | None]
    ) -> None:
        self._committer, self._launcher, self._make_manager = committer, launcher, make_manager
        self._plan = committer.exchange.plan
        self._schedule = Schedule(self._plan, self._plan.region_rules, only_when_due=True)
        self._exchange: Exchange | None = None
        self._last_sites = 0
        self._averaged_step = 0
        """The last inner step of which the gradients were averaged."""
        self._not_before = 0
        """The inner step at which all can be who met at different ones."""

    def open(self, verdict: Verdict) -> None:
        """Meet the other sites of the region from now on, which wait for this one. A collective over the site.

        Hazard: not before this site stands where they do. They would wait for it in their quorum, and it for them in the one
        of all sites.

        Args:
            verdict: of the round in which this site has joined.
        """
        of_all = self._committer.exchange
        labels = verdict.labels(of_all.groups)[REGION]
        neighbours = labels.count(labels[of_all.manager.participating_rank()])
        manager = of_all.pairing.manager_of_all_ranks(adapt_manager(self._make_manager(neighbours)))
        healing = Healing(
            of_all.states,
            lineage=of_all.lineage,
            schedule=self._schedule,
            progress=self._committer.progress,
            checksum=self._committer.checksum,
            manager=manager,
            site=of_all.site,
        )
        self._exchange = replace(
            of_all, manager=manager, healing=healing, wire=wire_device(manager), at_one_commit=True
        )

    def after_step(self, step: int, beside: Sequence[int]) -> None:
        """Average the parameters, if that is what regions do and it is due.

        Args:
            step: the inner step.
            beside: rules of a round of all sites that was tried after it; what that averages, a region need not.
        """
        if self._plan.averages_gradients:
            return
        is_due = self._schedule.advance(step)
        fragments = averaged_by_all(self._plan.rules, beside)
        self._schedule.settle(rule for rule in self._plan.region_rules if self._plan.rules[rule].fragment in fragments)
        if is_due and self._schedule.pending and self._exchange is not None and step >= self._not_before:
            launch = self._launcher.launch(self._schedule.take())
            self._run(self._exchange, replace(launch, tokens=launch.work[launch.rules[0]][0]))

    def average_gradients(self, step: int, tokens: int) -> None:
        """Average the gradients of an inner step, if that is what regions do and it was not done yet.

        Args:
            step: the inner step.
            tokens: that this site's are of; 0 where it does not take the step.
        """
        if not self._plan.averages_gradients or step == self._averaged_step:
            return
        self._averaged_step = step
        if self._exchange is not None and step >= self._not_before:
            self._run(self._exchange, self._launcher.launch_gradients(self._plan.region_rules, step, tokens))

    def finish(self) -> None:
        """Leave no site of the region without what it still reads of the last round."""
        if self._exchange is not None and self._last_sites > 1:
            self._exchange.farewell()

    def _run(self, exchange: Exchange, launch: Launch) -> None:
        manager = exchange.manager
        manager.load_state_dict(dict(_COUNTERS))
        exchange.healing.begin(launch)
        result = exchange.run(launch)
        started, failure = exchange.clock.now(), manager.errored()
        with span("vote"):
            committed = manager.should_commit()
        applied = committed and result.sum is not None and self._apply(exchange, launch, result.sum)
        if not committed:
            self._not_before = max(exchange.site.gather(result.verdict.resync_step))
        exchange.healing.end()
        self._last_sites = result.sites
        self._record(exchange, result, failure, committed, applied, exchange.clock.now() - started)

    def _apply(self, exchange: Exchange, launch: Launch, summed: Sum) -> bool:
        """Whether there was a mean to apply."""
        exchange.complete(summed)
        of = summed.of_group(REGION, launch.step)
        if not of.total_weight or not mean_is_finite_on_all_ranks(exchange, summed, launch.step):
            return False
        with span("apply"):
            for index, part in summed.parts.items():
                exchange.states[index].apply(part, of)
        if not summed.own_is_finite:
            self._committer.view.reset_broken_states()
        self._committer.progress.settle_work(launch.work, summed.parts)
        return True

    def _record(
        self,
        exchange: Exchange,
        result: RoundResult,
        failure: object | None,
        committed: bool,
        applied: bool,
        seconds: float,
    ) -> None:
        moved = exchange.take_bytes()
        contributors = result.contributors if applied else []
        reducing = result.sum.seconds if result.sum is not None else 0.0
        record = RoundRecord(
            level="region",
            round=exchange.lineage.position.round,
            step=result.launch.step,
            rules=[exchange.states[index].key for index in result.rules],
            participants=len(contributors),
            contributors=[result.verdict.name(rank) for rank in contributors],
            tokens=sum(result.verdict.table[rank].tokens for rank in contributors),
            sites=result.sites,
            **moved,
            seconds_waiting=result.seconds_waiting,
            seconds_quorum=result.seconds_quorum,
            seconds_reduce=reducing,
            seconds_apply=seconds,
            committed=committed,
            error=None if committed else why_not_committed(result, failure),
            seconds_stalled=result.seconds_quorum + reducing + seconds,
            seconds_hidden=0.0,
        )
        self._committer.ledger.add(record)
        if not committed:
            logger.warning("the region's round after inner step %d was not committed: %s", record.step, record.error)
        if self._committer.on_round is not None:
            self._committer.on_round(record)
