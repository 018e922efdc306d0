"""A whole run in virtual time: real outer loops over simulated links, with faults."""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from titan_ext.data.loader import TextDataLoader
from titan_ext.errors import RunError, UserError
from titan_ext.lab.faults import Fault
from titan_ext.lab.lighthouse import Lighthouse, Member, Quorum
from titan_ext.lab.manager import LabManager
from titan_ext.lab.messages import Group
from titan_ext.lab.network import QUEUE_SECONDS, Network
from titan_ext.lab.simulation import Process, Simulation
from titan_ext.lab.stand_in import StandInTrainee, Trainee
from titan_ext.lab.trace import Outcome, SiteTrace
from titan_ext.links.link import Links
from titan_ext.links.tcp import Transport
from titan_ext.planner.step_time import tokens_per_step
from titan_ext.semi_sync.engine import SemiSync
from titan_ext.semi_sync.options import SiteOptions
from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.round.round import InFlightRound
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.sources.source import Source
from titan_ext.semi_sync.wire.ledger import RoundRecord

_SHORTEST_STEP = 0.5  # of the usual one, whatever the jitter


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a rehearsal is of."""

    sites: Sequence[Any]
    """``Site`` of a run, all of one process each."""
    links: Links
    step_seconds: Sequence[float]
    """Of an inner step, by site."""
    shrinking: float
    """How many times fewer elements the stand-ins have than the models."""
    transport: Transport = Transport()
    connections: int = 1
    """Pairs of ranks of two sites that exchange at once."""
    faults: Sequence[Fault] = ()
    seed: int = 0
    step_jitter: float = 0.02
    """Standard deviation of a step's time, as a share of it."""
    trip_jitter: float = 0.05
    """Standard deviation of a message's time on the way, as a share of the round trip."""
    queue_seconds: float = QUEUE_SECONDS
    """As ``Network`` has it."""
    until: float = float("inf")
    """Seconds after which the rehearsal ends, wherever it is."""


class Rehearsal:
    """The sites, the network and the lighthouse of one run.

    Args:
        script: what it is of.
        trainee: makes what trains at a site, given its place, at each of its starts; by default a stand-in.
        observe: told of every round of a site, with its outer loop.
    """

    def __init__(
        self,
        script: Script,
        *,
        trainee: Callable[[int], Trainee] | None = None,
        observe: Callable[[SemiSync, RoundRecord], None] | None = None,
    ) -> None:
        self.script = script
        self.observe = observe
        self.trainee = trainee or self._stand_in
        self.simulation = Simulation()
        self.network = Network(
            self.simulation,
            script.links,
            script.transport,
            connections=script.connections,
            jitter=script.trip_jitter,
            seed=script.seed,
            queue_seconds=script.queue_seconds,
        )
        replica = script.sites[0].config.replica
        self.lighthouse = Lighthouse(
            self.simulation,
            self.network,
            min_sites=replica.min_sites,
            expected_sites=len(script.sites),
            heartbeat_interval_seconds=replica.heartbeat_interval_seconds,
            heartbeat_timeout_seconds=replica.heartbeat_timeout_seconds,
            join_timeout_seconds=replica.join_timeout_seconds,
            formed=self._formed,
        )
        self.managers: dict[Member, LabManager] = {}
        self.traces = [SiteTrace(name=site.name) for site in script.sites]
        self._lives: dict[int, _Life] = {}

    def run(self) -> Outcome:
        """Run to the end.

        Raises:
            UserError: the outer loop refuses the configuration.
        """
        with _quiet():
            for site in range(len(self.script.sites)):
                self.start(site)
            for fault in self.script.faults:
                self.simulation.at(fault.at, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
            self.simulation.run(self.script.until)
            for life in self._lives.values():
                life.stop()
            self.simulation.close()
        for site, trace in enumerate(self.traces):
            trace.sent_bytes = self.network.sent[site]
        ends = [life for life in self._lives.values() if life.finished]
        return Outcome(
            sites=self.traces,
            seconds=max(trace.ended for trace in self.traces),
            finished=bool(ends),
            state_sha256=ends[0].sha256 if ends else "",
            longest_silence=self.lighthouse.longest_silence,
        )

    def _stand_in(self, site: int) -> Trainee:
        config = self.script.sites[site].config
        return StandInTrainee(config, site, self.script.seed, self.script.shrinking)

    def start(self, site: int) -> None:
        """A site starts, or starts again."""
        if site not in self._lives or self._lives[site].is_over:
            self._lives[site] = _Life(self, site)

    def forget(self, life: "_Life") -> None:
        """A site is gone: the others' connections to it close."""
        self.lighthouse.lose(life.manager.member)
        group = life.manager.group
        if group is not None:
            trip = max((link.rtt for link in self.script.links.of(life.site)), default=0.0) / 2
            reason = f"{self.traces[life.site].name} is gone"
            self.simulation.after(trip, lambda: group.break_up(reason))

    def donor(self, but: LabManager) -> LabManager | None:
        """A site that could send its state."""
        alive = [each.manager for each in self._lives.values() if not each.is_over and each.manager is not but]
        furthest = max(alive, key=lambda manager: manager.step, default=None)
        return furthest if furthest is not None and furthest.step > 0 else None

    def _formed(self, quorum: Quorum) -> None:
        managers = [self.managers[member] for member in quorum.members]
        timeout = self.script.sites[0].config.replica.timeout_seconds
        scale = self._lives[quorum.members[0].site].scale
        group = Group(self.simulation, self.network, [member.site for member in quorum.members], scale, timeout)
        for manager in managers:
            manager.enter(group)
        furthest = max(managers, key=lambda manager: manager.step)
        for manager in managers:
            if manager.step < furthest.step:
                manager.is_sent(furthest.member.site, furthest.step, furthest.shared_state())

    def _strike(self, fault: Fault) -> None:
        site = fault.sites[0]
        if fault.kind == "partition":
            self.network.partition(fault.sites, until=self.simulation.now + fault.seconds)
        elif fault.kind == "slow":
            self._lives[site].factor = fault.factor
            self.simulation.after(fault.seconds, lambda: setattr(self._lives[site], "factor", 1.0))
        elif not self._lives[site].is_over:
            self._lives[site].kill()
            self.simulation.after(fault.seconds, lambda: self.start(site))


class _Life:
    """A site from its start to its end: a stand-in model, the file's optimizer and outer loop."""

    def __init__(self, lab: Rehearsal, site: int) -> None:
        script = lab.script
        self.site, self.is_over, self.finished, self.sha256 = site, False, False, ""
        self.factor = 1.0
        """How many times as long as usual its steps take."""
        self._lab, self._trace, self._config = lab, lab.traces[site], script.sites[site].config
        if self._trace.lives:
            self._trace.away_seconds += lab.simulation.now - self._trace.ended
        self._trace.lives += 1
        self._trainee = lab.trainee(site)
        self.scale = self._trainee.scale
        member = Member(site, self._trace.name)
        self.manager = lab.managers[member] = LabManager(
            lab.simulation,
            lab.network,
            lab.lighthouse,
            member,
            min_sites=self._config.replica.min_sites,
            scale=self.scale,
        )
        self._times = Random(f"{script.seed}/{site}/{self._trace.lives}")
        self._children: list[Process] = []
        self._optimizer = self._config.optimizer.build(model_parts=[self._trainee.model])
        self._rates = [(group, group["lr"]) for each in self._optimizer for group in each.param_groups]
        self._outer = self._outer_loop()
        self._process = lab.simulation.spawn(self._live)

    def stop(self) -> None:
        """The rehearsal ends."""
        if not self.is_over:
            self._over()
            if self._lab.script.until == float("inf"):
                self._trace.error = "waited for sites that did not come back"

    def kill(self) -> None:
        """The site is gone, in the middle of whatever it does."""
        self._over()
        self._lab.forget(self)
        for process in (*self._children, self._process):
            process.end()

    def _over(self) -> None:
        self.is_over = True
        self._trace.ended = max(self._trace.ended, self._lab.simulation.now)

    def _live(self) -> None:
        try:
            self._train()
            self.finished = True
        except (RunError, UserError, RuntimeError) as error:
            self._trace.error = str(error)
        self._over()
        self._lab.lighthouse.lose(self.manager.member)

    def _train(self) -> None:
        outer = self._outer
        donor = self._lab.donor(self.manager)
        if donor is not None and self._config.replica.prefetch_state:
            self.manager.prefetch(donor)
        self._lab.lighthouse.hear(self.manager.member)
        outer.join()
        if self._trace.lives == 1:
            self._trace.started = self._lab.simulation.now
        tokens = tokens_per_step(self._lab.script.sites[self.site])
        while outer.inner_step < self._config.training.steps and not outer.run_is_over:
            # What the model does between two rounds changes nothing but time.
            meets = bool(outer.plan.due(outer.inner_step + 1))
            takes = (
                not outer.sits_out
            )  # otherwise the step is counted alone: its part of a box is done, or it was not sampled
            if takes:
                self._step(meets)
            if meets:
                self._trace.marks.append((self._lab.simulation.now, outer.inner_step + 1))
            outer.step(tokens if takes else 0)
            self._trace.steps = outer.inner_step
        outer.finish()
        self.sha256 = outer.shared_state_sha256()

    def _step(self, moves: bool) -> None:
        usual = self._lab.script.step_seconds[self.site] * self.factor
        seconds = usual * max(_SHORTEST_STEP, self._times.gauss(1.0, self._lab.script.step_jitter))
        self._lab.simulation.sleep(seconds)
        self._trace.training_seconds += seconds
        rate = self._trainee.rate
        if (moves or self._trainee.at_every_step) and rate > 0:
            for group, usual_rate in self._rates:
                group["lr"] = usual_rate * rate
            self._trainee.compute_gradients()
            self._optimizer.step()

    def _outer_loop(self) -> SemiSync:
        try:
            return self._build_outer_loop()
        except ValueError as error:
            raise UserError(
                f"site {self._trace.name} cannot be rehearsed with a stand-in for its model: {error}"
            ) from error

    def _build_outer_loop(self) -> SemiSync:
        simulation, replica, data = self._lab.simulation, self._config.replica, self._config.dataloader
        sources = data.all_sources() if isinstance(data, TextDataLoader.Config) else []
        return SemiSync(
            self._config.semi_sync,
            model_parts=[self._trainee.model],
            optimizers=self._optimizer,
            manager=self.manager,
            site=SiteOptions(
                name=self._trace.name,
                weight=self._lab.script.sites[self.site].weight,
                ranks=SiteRanks(alone=True),
                heartbeat_timeout_seconds=replica.heartbeat_timeout_seconds,
                clock=Clock(lambda: simulation.now, simulation.sleep),
                make_in_flight=lambda: _InFlight(simulation, self._children),
                sources=[Source(name=each.name, weight=each.weight) for each in sources],
            ),
            on_round=self._note,
        )

    def _note(self, record: RoundRecord) -> None:
        """Keep the record of a round, with the bytes that the model would have sent."""
        sent, received = (round(self.scale * size) for size in (record.bytes_sent, record.bytes_received))
        scaled = replace(record, bytes_sent=sent, bytes_received=received)
        self._trace.rounds.append((self._lab.simulation.now, scaled))
        if self._lab.observe is not None:
            self._lab.observe(self._outer, record)


class _InFlight(InFlightRound):
    """A round beside inner steps is a process of the simulation."""

    def __init__(self, simulation: Simulation, children: list[Process]) -> None:
        super().__init__()
        self._simulation, self._children = simulation, children

    def start(self, run: Any, apply_at: int) -> None:
        process = self._simulation.spawn(run)
        process.is_awaited = True
        self._children[:] = [*(each for each in self._children if not each.is_over), process]
        self._round, self.apply_at = process, apply_at  # type: ignore[assignment]

    @property
    def has_arrived(self) -> bool:
        round_ = self._round
        return round_.is_over if isinstance(round_, Process) else super().has_arrived


@contextmanager
def _quiet() -> Any:
    """Without the outer loops' own messages, which are of all sites at once, and on one thread of torch's."""
    logger, threads = logging.getLogger("titan_ext.semi_sync"), torch.get_num_threads()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        logger.setLevel(before)
        torch.set_num_threads(threads)
