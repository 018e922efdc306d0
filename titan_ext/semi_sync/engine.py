"""The outer loop: one engine that runs the sync plan of any method."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext.errors import UserError
from titan_ext.semi_sync import checkpoint
from titan_ext.semi_sync.build import build
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.options import SiteOptions
from titan_ext.semi_sync.plan.resolve import resolve, settings_by_key
from titan_ext.semi_sync.plan.schedule import StepTimer
from titan_ext.semi_sync.plan.weighting import UNKNOWN
from titan_ext.semi_sync.round.launching import RoundLauncher
from titan_ext.semi_sync.round.region_rounds import RegionRounds
from titan_ext.semi_sync.round.round import Launch, Role, RoundResult
from titan_ext.semi_sync.round.slack import Slack
from titan_ext.semi_sync.site.ranks import tensors_sha256
from titan_ext.semi_sync.state.checksum import model_checksum
from titan_ext.semi_sync.state.sparse_tables import SparseTable
from titan_ext.semi_sync.state.synced_state import SyncedState
from titan_ext.semi_sync.state.views import like, moments_kept
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager

logger = logging.getLogger(__name__)

# Between attempts to join a quorum that forms but is too small or fails.
_PAUSE_SECONDS = 0.5
# At the end of a run in which sites train on: the others are as many rounds behind at most.
_MOST_CLOSING_ROUNDS = 16


class SemiSync:
    """Synchronises a model between sites while each takes its own inner steps.

    Call ``join()`` before the first inner step, ``step()`` after each, ``finish()`` after the last.
    Sites call them from one thread. Ranks are paired: rank r of a site exchanges with rank r of the
    others, so all sites need the same parallel layout; with ``pairing = "leader"`` rank 0 of each site
    exchanges whole tensors, and sites may differ.

    Args:
        config: the method and its settings.
        model_parts: this rank's parts of the model: one, or one for each pipeline stage it holds.
        optimizers: the inner optimizer(s), for methods that sync their states.
        manager: this rank's replica manager, such as ``torchft.manager.Manager`` built with
            ``use_async_quorum=False``. With ``pairing = "leader"`` rank 0 gives the manager of a replica
            group of one rank, and the other ranks None.
        site: who this site is, and what it chooses for itself; ``pairing`` and ``outer_state_device`` are the
            configuration's.
        on_round: called with the record of every round, committed or not.
        outer_optimizers: for each fragment an optimizer of the user's own over the fragment's parameters,
            instead of the configured one; it is made to work on the global copy.
        must_agree: what else has to be equal at sites that exchange, by key, such as the run's last step.
        described: settings behind the model and its layout by configuration key, to name a difference of sites by.
        keep_local_work: after a round that was not committed, keep what was done since the last one
            and try again at the next step; False goes back to the global parameters and waits for the
            next round of the schedule.
        register: name the shared state to the manager; False leaves that to the caller.

    Raises:
        ValueError: a setting is wrong, or a synced state does not exist.
    """

    @dataclass(kw_only=True)
    class Config(SemiSyncConfig):
        """``SemiSyncConfig`` that builds the outer loop, as torchtitan's configs build their owners."""

        def build(self, **parts: Any) -> "SemiSync":
            """The outer loop; ``parts`` are the arguments of ``SemiSync`` beside the configuration."""
            return SemiSync(self, **parts)

    def __init__(
        self,
        config: SemiSyncConfig,
        *,
        model_parts: Iterable[nn.Module],
        optimizers: Any,
        manager: ReplicaManager | None,
        site: SiteOptions = SiteOptions(),
        on_round: Callable[[RoundRecord], None] | None = None,
        outer_optimizers: Sequence[Optimizer] | None = None,
        must_agree: Mapping[str, Any] | None = None,
        described: Mapping[str, Any] | None = None,
        keep_local_work: bool = True,
        register: bool = True,
    ) -> None:
        ranks = site.ranks
        self.plan = resolve(config, lambda: [each for rank in ranks.gather(moments_kept(optimizers)) for each in rank])
        # "auto" is for a file that knows all sites.
        pairing: Literal["rank", "leader"] = "leader" if config.pairing == "leader" else "rank"
        self._committer = build(
            self.plan,
            model_parts=model_parts,
            optimizers=optimizers,
            manager=manager,
            site=replace(site, pairing=pairing, outer_state_device=config.outer_state_device),
            outer_optimizers=outer_optimizers,
            must_agree=must_agree,
            settings=settings_by_key(config),
            model=described,
            keep_local_work=keep_local_work,
            on_round=on_round,
        )
        self._exchange, self._schedule = self._committer.exchange, self._committer.schedule
        self._progress, self._participation = self._committer.progress, self._committer.participation
        self._sources = self._participation.sources
        self._manager, self._states = self._exchange.manager, self._exchange.states
        self._in_flight = site.make_in_flight()
        self._clock = site.clock
        self._timer = StepTimer(site.clock.now)
        self._slack = Slack(self.plan.lateness.grace, site.clock)
        self._launcher = RoundLauncher(self.plan, self._progress, self._participation, self._timer, site.weight)
        self._regions = None
        if site.region_manager is not None and self.plan.region_rules:
            self._regions = RegionRounds(self._committer, self._launcher, site.region_manager)
        self._measure_loss = site.measure_loss or (lambda: UNKNOWN)
        self._restored = False
        if register:
            self._manager.register_state_dict_fn("titan_ext", self.receive_shared_state, self.shared_state)

    # -- the loop ----------------------------------------------------------------------------------

    def step(self, tokens: int = 1) -> None:
        """Call after each inner optimizer step; with ``sync_point = "before_step"`` before it, once the gradients are
        there.

        Args:
            tokens: what the step trained on, for weights by tokens.
        """
        self._timer.stop(taken=not self.sits_out)
        if self.plan.sync_point == "after_step":
            self._count(tokens)
        if self._regions is not None:
            # A site that has not taken the step comes all the same: the others wait for it.
            self._regions.average_gradients(self.inner_step, tokens=0)
        if self._in_flight.due(self.inner_step) and self._may_apply():
            self._apply_in_flight()
        if self._sources.more and (rules := self.plan.due(self.inner_step)):
            self.inner_step = self._sources.end_turn(rules, self._launcher.weight(rules))
        else:
            is_due = self._schedule.advance(self.inner_step) and not self._in_flight.under_way
            taken = self._run_round() if is_due else ()
            if self._regions is not None:
                self._regions.after_step(self.inner_step, beside=taken)
        if self.plan.sync_point == "before_step":
            self._count(tokens)
        self._timer.pause() if self.sits_out else self._timer.start()

    def _run_round(self) -> Sequence[int]:
        """One round: now from beginning to end, or started beside the inner steps that it may overlap; returns its rules."""
        launch = self._begin(self._take_rules())
        delay = max(self._states[index].rule.delay for index in launch.rules)
        if delay == 0:
            self._settle(self._exchange.run(launch))
            return launch.rules
        # The inner loop goes on and changes the parameters: what is sent is written now.
        contribution = self._exchange.writer.write(launch.rules, launch.step, launch.weight, launch.standing)

        def run() -> RoundResult:
            self._slack.hold_back(delay)
            return self._exchange.run(launch, contribution)

        self._in_flight.start(run, self.inner_step + delay)
        return launch.rules

    def _take_rules(self) -> list[int]:
        if self.plan.lateness.trains_on:
            return self._schedule.take_turn(self._exchange.lineage.commits)
        return self._schedule.take()

    def _may_apply(self) -> bool:
        """Whether to apply a round that is due: where sites train on, once all ranks of the site have its sum."""
        return not self.plan.lateness.trains_on or all(self._exchange.site.gather(self._in_flight.has_arrived))

    def _apply_in_flight(self) -> None:
        started = self._clock.now()
        result = self._in_flight.wait()
        waited = self._clock.now() - started
        self._slack.learn(result.launch.step_time_ms / 1000, result.seconds_exchanged)
        # The inner loop was running when a peer's state came in; only now may it be taken in.
        _, healed = self._exchange.healing.take_in(result.launch, result.verdict)
        self._settle(replace(result, healed=healed, seconds_waited=waited))

    def _settle(self, result: RoundResult) -> bool:
        """Vote, and apply the round if the vote is a yes; otherwise it is tried again."""
        committed = self._committer.commit(result)
        received = bool(result.rules) or result.healed or self._progress.loss < 0
        if committed and received and self.plan.weighting.needs_loss:
            loss = self._measure_loss()
            self._progress.loss = loss if math.isfinite(loss) else UNKNOWN
        return committed

    def _begin(self, rules: Sequence[int], role: Role = Role.MEMBER) -> Launch:
        launch = self._launcher.launch(rules, role)
        self._exchange.healing.begin(launch)
        return launch

    def _count(self, tokens: int) -> None:
        self._sources.count_step(self._progress.step)
        self._progress.step += 1
        self._progress.tokens += tokens
        taken = not self._participation.sits_out
        for index in range(len(self.plan.rules)):
            done = self._progress.work.get(index, (0, 0))
            self._progress.work[index] = (done[0] + tokens, done[1] + taken)
        self._participation.count_step()

    def average_gradients(self, tokens: int = 1) -> None:
        """Call at every inner step that is taken, once its gradients are there and before they are clipped.

        With ``region_average = "gradients"`` they become the mean over the site's region, which waits for this; otherwise
        nothing happens.

        Args:
            tokens: that they are of, at least 1: sites weigh by them.
        """
        if self._regions is not None:
            self._regions.average_gradients(self.inner_step + 1, tokens)

    # -- the beginning and the end -------------------------------------------------------------------

    def join(self, loaded: bool | None = None) -> None:
        """Take part in a quorum before the first inner step.

        Unless ``load_state_dict`` restored a global copy, the run starts from the parameters as they are now, whatever
        loaded them. Sites that begin together from loaded models must have loaded the same one; of random
        initialisations all take one site's.

        All sites starting together only agree on the starting point; those that resume go on from their
        own inner steps. A site that comes later takes over the members' shared state and the round they
        are in, without contributing to it, so that its very first contribution counts. Afterwards
        ``inner_step`` is the members'.

        Args:
            loaded: whether the parameters come from a loaded model; None: if they changed since the loop was built.

        Raises:
            UserError: the other sites run another plan or model, or start from another one; names what differs.
        """
        if not self._restored:
            self._start_from_parameters(loaded)
        told = None
        while (problem := self._try_to_join()) is not None:
            if problem != told:
                logger.warning("not joining yet: %s", problem)
                told = problem
            self._clock.sleep(_PAUSE_SECONDS)

    def _try_to_join(self) -> str | None:
        """One quorum of a site that abstains; why it has not joined, None if it has."""
        result = self._exchange.run(self._begin([], Role.JOINING))
        travelled = bool(result.rules)
        if travelled or result.healed:
            self._in_flight.forget()  # a round in flight at the last checkpoint has long been applied at the members
        delay = max((self._states[index].rule.delay for index in result.rules), default=0)
        if delay and self._manager.errored() is None:
            self.inner_step = result.verdict.step
            self._committer.take_over(result)
            self._in_flight.keep(replace(result, taken_over={}), self.inner_step + delay)
            return None
        refused, problem = result.verdict.refused, result.verdict.problem
        if self._settle(result):
            if travelled or result.healed:
                self.inner_step = result.verdict.step
            elif self._schedule.is_ready(self.inner_step):
                # Stopped while the others were still on their way to this round, which they now come to.
                self._run_round()
            if self._regions is not None:
                self._regions.open(result.verdict)
            return None
        if refused:
            raise UserError(problem)
        return problem or "the exchange with another site failed"

    def _start_from_parameters(self, loaded: bool | None) -> None:
        """What was loaded after the loop was built is what it starts from, and what joining sites receive."""
        changed = [state.start_from_local() for state in self._states]
        site, speaks_for = self._exchange.site, self._exchange.pairing.speaks_for
        if any(site.gather(any(changed) if loaded is None else loaded)):
            self._exchange.lineage.origin = model_checksum(self._states, site, speaks_for)

    def finish(self) -> None:
        """Apply what is still in flight; call after the last inner step.

        Methods whose sites differ until the end exchange their last mean here; all sites call this
        after the same inner step.
        """
        if self._in_flight.under_way:
            self._apply_in_flight()
        if self.plan.lateness.trains_on:
            self._close()
        elif self._schedule.finish(self.inner_step):
            self._run_round()
        if self.ledger.last is not None and self.ledger.last.sites > 1:
            self._exchange.farewell()
        if self._regions is not None:
            self._regions.finish()
        self._in_flight.close()

    def _close(self) -> None:
        """Rounds until all sites of one have taken their last inner step: others may come to theirs a little later."""
        for _ in range(_MOST_CLOSING_ROUNDS):
            launch = self._begin(self._take_rules())
            is_new = any(launch.work[index][1] for index in launch.rules)
            result = self._exchange.run(replace(launch, closes=True, weight=launch.weight if is_new else 0.0))
            if self._settle(result) and all(site.closes for site in result.verdict.table):
                return
        logger.warning("the other sites did not come to the end of the run; this one ends without them")

    def end_of_data(self) -> None:
        """This site has nothing more to train on: from now on it sits out, until the run's end or until it is over."""
        self._participation.data_ended = True

    def serve_snapshot_requests(self) -> None:
        """Call between inner steps, on all ranks: a site about to join may want a copy of the shared state."""
        self._manager.serve_snapshot_requests()

    # -- where the run stands ------------------------------------------------------------------------

    @property
    def weight_factor(self) -> float:
        """What the site's weight in the rounds to come is multiplied by; the training loop's to set."""
        return self._launcher.weight_factor

    @weight_factor.setter
    def weight_factor(self, factor: float) -> None:
        self._launcher.weight_factor = factor

    @property
    def inner_step(self) -> int:
        """Inner steps of the run so far; all sites share them."""
        return self._progress.step

    @inner_step.setter
    def inner_step(self, step: int) -> None:
        self._progress.step = step

    @property
    def ledger(self) -> Ledger:
        """What rounds have cost."""
        return self._committer.ledger

    @property
    def pairing(self) -> str:
        """Who exchanges: "rank" or "leader"."""
        return self._exchange.pairing.name

    @property
    def rounds(self) -> int:
        """Commits of the run that the shared state contains."""
        return self._exchange.lineage.position.round

    @property
    def sits_out(self) -> bool:
        """Whether to count this site's inner steps without taking them: it was not sampled, or its data has ended."""
        return self._participation.sits_out

    @property
    def source(self) -> str:
        """Name of the data source that the next inner step trains; of a site without sources its own."""
        return self._sources.current.name

    @property
    def more_sources(self) -> bool:
        """Whether, within a round, another source of this site is yet to take the inner steps that one has taken."""
        return self._sources.more and self._sources.under_way

    @property
    def schedule_step(self) -> int:
        """Inner steps before the next one by which its learning rate goes, see ``source_clock``."""
        return self._sources.clock

    @property
    def run_is_over(self) -> bool:
        """Whether no site has anything left to contribute: all end after this inner step."""
        return self._participation.run_is_over

    @property
    def sites(self) -> int:
        """Sites in the current quorum."""
        return self._manager.num_participants()

    def global_parameters(self) -> dict[str, torch.Tensor]:
        """The last committed global value of every parameter this rank holds, by name (DTensor where sharded).

        Where a method's sites differ until the end, the values are this site's own.
        """
        return self._values_of(self._states)

    def received_parameters(self) -> dict[str, torch.Tensor]:
        """As ``global_parameters``, only those that are the same at all sites: what the last round has brought."""
        return self._values_of([state for state in self._states if state.facts.equal_at_all_sites])

    def _values_of(self, states: Sequence[SyncedState]) -> dict[str, torch.Tensor]:
        return {
            name: like(self._committer.view.tensor(name), part)
            for state in states
            for name, part in zip(state.names, state.global_values(), strict=False)  # some states have none
        }

    def shared_state_sha256(self) -> str:
        """Hash of the global parameters: equal at all sites after a commit. A collective over the site."""
        apart = {
            name
            for state in self._states
            if isinstance(state, SparseTable) or state.facts.equal_in_group
            for name in state.names
        }
        shared = [(name, value) for name, value in self.global_parameters().items() if name not in apart]
        return tensors_sha256(shared, self._exchange.site)

    def steps_past_shared(self) -> int:
        """Inner steps of this site since the last commit of what it shares, which no hash of that covers."""
        work = self._progress.work
        facts = [state.facts for state in self._states]
        copied = [index for index, each in enumerate(facts) if each.copies and each.equal_at_all_sites]
        return max((work.get(index, (0, 0))[1] for index in copied), default=0)

    def own_buffers(self) -> list[str]:
        """Names of the buffers that are no mean of the sites'. A collective over the site."""
        view = self._committer.view
        return sorted({name for rank in self._exchange.site.gather(view.own_buffers) for name in rank})

    def state_dict(self) -> dict[str, Any]:
        """Everything the outer loop knows, with global shapes, for a distributed checkpoint.

        A round in flight is waited for and saved as its reduced buffer, so that it is applied after a
        resume exactly as it would have been.
        """
        return checkpoint.save(self._committer, self._in_flight)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the local parameters are the model's own business."""
        checkpoint.load(self._committer, self._in_flight, state_dict)
        self._restored = True

    def shared_checkpoint(self) -> tuple[dict[str, Any], list[str]]:
        """What a joining site takes over, as another site's checkpoint holds it (``state_dict``), to load that into; and
        the names of what of the model's own checkpoint belongs to it.

        Raises:
            ValueError: it cannot be had from a checkpoint.
        """
        return checkpoint.shared(self._committer)

    def take_shared_checkpoint(self, state_dict: Mapping[str, Any]) -> None:
        """Begin with what has been loaded into ``shared_checkpoint``, as a site that joins the one that saved it."""
        checkpoint.take_shared(self._committer, state_dict)
        self._restored = True

    # -- a peer's state ------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """What a joining site takes over; its tensors are the live ones, unchanged until the round's commit."""
        return self._exchange.healing.offer()

    def receive_shared_state(self, state: Mapping[str, Any]) -> None:
        """Keep a peer's ``shared_state`` until the round under way can take it in."""
        self._exchange.healing.receive(state)
