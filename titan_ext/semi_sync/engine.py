"""The outer loop: one engine that runs the sync plan of any method."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from titan_ext.errors import UserError
from titan_ext.semi_sync.build import assemble
from titan_ext.semi_sync.checkpoint import Saving
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.plan.pace import Pace
from titan_ext.semi_sync.round.commit import Settling
from titan_ext.semi_sync.round.commit_log import CommitLog
from titan_ext.semi_sync.round.round import Round
from titan_ext.semi_sync.site.ranks import SiteRanks, tensors_sha256
from titan_ext.semi_sync.state.checksum import model_checksum
from titan_ext.semi_sync.state.token_row_map import RowIds
from titan_ext.semi_sync.state.views import like
from titan_ext.semi_sync.wire.ledger import Ledger, RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager

logger = logging.getLogger(__name__)


# Between attempts to join a quorum that forms but is too small or fails.
_PAUSE_SECONDS = 0.5


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
        site_weight: this site's weight under ``weighting = "site"``.
        site_ranks: the ranks of this site; by default those of the default process group.
        site_name: under which commits are recorded; no two sites of a run share one. At most 64 bytes.
        commit_log: where commits are recorded; that of rank 0 counts.
        roll_back: go on from a checkpoint older than this site's last commit even if a site that took part in it
            is missing.
        on_round: called with the record of every round, committed or not.
        outer_optimizers: for each fragment an optimizer of the user's own over the fragment's parameters,
            instead of the configured one; it is made to work on the global copy.
        row_ids: which rows of the run's tables this site holds, for scopes with ``shared = "rows"``.
        keep_local_work: after a round that was not committed, keep what was done since the last one
            and try again at the next step; False goes back to the global parameters and waits for the
            next round of the schedule.
        silence_seconds: after which the lighthouse takes a site for dead. A round that breaks is tried again after
            about as long; until then a quorum would be waited for, and the inner loop goes on instead.
        register: name the shared state to the manager; False leaves that to the caller.

    Raises:
        ValueError: a setting is wrong, or a synced state does not exist.
    """

    Config = SemiSyncConfig

    def __init__(
        self,
        config: SemiSyncConfig,
        *,
        model_parts: Iterable[nn.Module],
        optimizers: Any,
        manager: ReplicaManager | None,
        site_weight: float = 1.0,
        site_ranks: SiteRanks | None = None,
        site_name: str = "",
        commit_log: CommitLog | None = None,
        roll_back: bool = False,
        on_round: Callable[[RoundRecord], None] | None = None,
        outer_optimizers: Sequence[Optimizer] | None = None,
        row_ids: RowIds | None = None,
        keep_local_work: bool = True,
        silence_seconds: float = 0.0,
        register: bool = True,
    ) -> None:
        parts = assemble(
            config,
            model_parts=model_parts,
            optimizers=optimizers,
            manager=manager,
            site=site_ranks or SiteRanks(),
            site_name=site_name,
            commit_log=commit_log,
            roll_back=roll_back,
            outer_optimizers=outer_optimizers,
            row_ids=row_ids,
            silence_seconds=silence_seconds,
        )
        self.config, self.plan = parts.config, parts.plan
        self._parts = parts
        self._progress, self._schedule, self._flight = parts.progress, parts.schedule, parts.flight
        self._manager, self._exchange, self._healing = parts.manager, parts.exchange, parts.healing
        self._rows = parts.rows
        self._settling = Settling(parts, keep_local_work=keep_local_work, on_round=on_round)
        self._saving = Saving(parts)
        self._pace = Pace()
        self._site_weight = site_weight
        self._current: Round | None = None
        self._restored = False
        if register:
            self._manager.register_state_dict_fn("titan_ext", self.receive_shared_state, self.shared_state)

    @property
    def clock(self) -> int:
        """Inner steps of the run so far; all sites share them."""
        return self._progress.clock

    @clock.setter
    def clock(self, step: int) -> None:
        self._progress.clock = step

    @property
    def ledger(self) -> Ledger:
        """What rounds have cost."""
        return self._settling.ledger

    @property
    def pairing(self) -> str:
        """Who exchanges: "rank" or "leader"."""
        return self._parts.pairing.name

    @property
    def rounds(self) -> int:
        """Commits of the run that the shared state contains."""
        return self._parts.lineage.position.round

    @property
    def idle(self) -> bool:
        """Whether this site sits the current round out: count its inner steps without taking them."""
        return self._parts.draw.idle

    @property
    def sites(self) -> int:
        """Sites in the current quorum."""
        return self._manager.num_participants()

    def join(self, loaded: bool | None = None) -> None:
        """Take part in a quorum before the first inner step.

        Unless ``load_state_dict`` restored a global copy, the run starts from the parameters as they are now, whatever
        loaded them. Sites that begin together from loaded models must have loaded the same one; of random
        initialisations all take one site's.

        All sites starting together only agree on the starting point; those that resume go on from their
        own inner steps. A site that comes later takes over the members' shared state and the round they
        are in, without contributing to it, so that its very first contribution counts. Afterwards
        ``clock`` is the members' inner step.

        Args:
            loaded: whether the parameters come from a loaded model; None: if they changed since the loop was built.

        Raises:
            UserError: the other sites run another plan or model, or start from another one; names what differs.
        """
        if not self._restored:
            self._start_from_parameters(loaded)
        said = ""
        while True:
            round_ = self._begin(None, weight=0.0)
            self._exchange.run(round_, self._all_ready)
            self._adopt(round_)
            if round_.rows or self._progress.healed:
                self._flight.forget()  # a round in flight at the last checkpoint has long landed at the members
            delay = max((self._rows[index].row.delay for index in round_.rows), default=0)
            if delay and self._manager.errored() is None:
                self.clock = round_.clock
                self._flight.hold(round_, self.clock + delay)
                return
            refusal = self._healing.mismatch(round_.problem) if round_.refused else None
            resumed = not round_.rows and not self._progress.healed
            if self._land(round_):
                if not resumed:
                    self.clock = round_.clock
                elif self._schedule.is_ready(self.clock):
                    # Stopped while the others were still on their way to this round, which they now come to.
                    self._launch()
                return
            if refusal is not None:
                raise UserError(refusal)
            problem = round_.problem or "the exchange with another site failed"
            if problem != said:
                logger.warning("not joining yet: %s", problem)
                said = problem
            time.sleep(_PAUSE_SECONDS)

    def step(self, tokens: int = 1) -> None:
        """Call after each inner optimizer step; with ``order = "paper"`` before it, once the gradients are there.

        Args:
            tokens: what the step trained on, for ``weighting = "tokens"``.
        """
        self._pace.stop()
        if self.config.order == "after_step":
            self._count(tokens)
        if self._flight.due(self.clock):
            self._land_flight()
        self._schedule.advance(self.clock)
        if self._schedule.is_ready(self.clock) and not self._flight.under_way:
            self._launch()
        if self.config.order == "paper":
            self._count(tokens)
        self._pace.start()

    def tend(self) -> None:
        """Call between inner steps, on all ranks: a site about to join may want a copy of the shared state.

        Needs a manager that gives copies, such as ``titan_ext.replica.Replica``.
        """
        self._manager.tend()

    def finish(self) -> None:
        """Apply what is still in flight; call after the last inner step.

        Methods whose sites differ until the end exchange their last mean here; all sites call this
        after the same inner step.
        """
        if self._flight.under_way:
            self._land_flight()
        if self._schedule.finish(self.clock):
            self._launch()
        if self.ledger.last is not None and self.ledger.last.sites > 1:
            # What the others still have to read of the last round lies in our connections; were they
            # closed now, some systems would throw it away. All have it when all come here.
            self._manager.allreduce(torch.zeros(1), reduce_op=ReduceOp.SUM).wait()
        self._flight.close()

    def global_parameters(self) -> dict[str, torch.Tensor]:
        """The last committed global value of every parameter this rank holds, by name (DTensor where sharded).

        Where a method's sites differ until the end, the values are this site's own.
        """
        return {
            name: like(self._parts.view.parameters[name], part)
            for row in self._rows
            for name, part in zip(row.names, row.global_values())
        }

    def shared_state_sha256(self) -> str:
        """Hash of the global parameters: equal at all sites after a commit. A collective over the site."""
        tables = {name for row in self._rows if row.by_row for name in row.names}
        shared = [(name, value) for name, value in self.global_parameters().items() if name not in tables]
        return tensors_sha256(shared, self._parts.site)

    def state_dict(self) -> dict[str, Any]:
        """Everything the outer loop knows, with global shapes, for a distributed checkpoint.

        A round in flight is waited for and saved as its reduced buffer, so that it lands after a
        resume exactly as it would have.
        """
        return self._saving.save(self._unsettled())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the local parameters are the model's own business."""
        self._saving.load(state_dict)
        self._restored = True

    # -- one round ---------------------------------------------------------------------------

    def _start_from_parameters(self, loaded: bool | None) -> None:
        """What was loaded after the loop was built is what it starts from, and what joining sites receive."""
        changed = [row.start_from_local() for row in self._rows]
        parts = self._parts
        if any(parts.site.gather(any(changed) if loaded is None else loaded)):
            parts.lineage.origin = model_checksum(self._rows, parts.site, parts.pairing.speaks_for)

    def _count(self, tokens: int) -> None:
        self._progress.clock += 1
        self._progress.tokens += tokens

    def _launch(self) -> None:
        intent = self._schedule.take()
        round_ = self._begin(intent, weight=self._weight())
        delay = max(self._rows[index].row.delay for index in intent)
        if delay == 0:
            self._exchange.run(round_, self._all_ready)
            self._adopt(round_)
            self._land(round_)
            return
        round_.rows = intent
        self._exchange.fill(round_)
        # The ranks of the site meet at the landing: here they may not, beside what the inner loop has them do.
        self._flight.start(lambda: self._exchange.run(round_, lambda _: True), self.clock + delay)

    def _begin(self, intent: list[int] | None, weight: float) -> Round:
        self._progress.launch_clock = self.clock
        self._healing.begin()
        self._current = Round(
            intent=intent,
            clock=self.clock,
            weight=weight,
            launched=list(intent or []),
            tokens=self._progress.tokens,
            pace=self._pace.milliseconds(),
        )
        return self._current

    def _land_flight(self) -> None:
        round_ = self._flight.land()
        # The inner loop was running when a peer's state came in; only now may it be taken in.
        self._all_ready(round_)
        self._adopt(round_)
        self._land(round_)

    def _adopt(self, round_: Round) -> None:
        """A newcomer takes over the rows that other sites know better; again in the next round if this one fails."""
        if round_.intent is None and self._manager.errored() is None:
            for index, messages in round_.adopted.items():
                self._rows[index].adopt(messages)

    def _land(self, round_: Round) -> bool:
        """Vote, and apply the round if the vote is a yes; otherwise it is tried again."""
        committed = self._settling.settle(round_)
        self._current = None
        return committed

    # -- membership --------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """What a joining site takes over; its tensors are the live ones, unchanged until the round's commit."""
        clock = self._current.clock if self._current is not None else self.clock
        return self._healing.offer(clock, self._unsettled())

    def receive_shared_state(self, state: Mapping[str, Any]) -> None:
        """Keep a peer's ``shared_state`` until the round under way can take it in."""
        self._healing.receive(state)
        if self._current is not None:
            self._current.intent = None

    def _all_ready(self, round_: Round) -> bool:
        """Whether all ranks of the site know the round; a peer's state is taken in if one came."""
        ready, state = self._healing.take_in()
        if state is not None:
            # The state may be a copy that the peer made some inner steps before this round.
            clock, pending = (round_.clock, round_.agreed) if round_.agreed else (state["clock"], state["pending"])
            # A round in flight was launched some inner steps ago; those count at the peer's place too.
            self.clock = clock + self.clock - self._progress.launch_clock
            self._schedule.replace(pending)
            self._parts.checksum.forget()
            self._progress.healed = True
        return ready

    # -- set-up and bookkeeping ----------------------------------------------------------------

    def _weight(self) -> float:
        if self.idle:
            return 0.0
        if self.config.weighting == "site":
            return self._site_weight
        return float(self._progress.tokens) if self.config.weighting == "tokens" else 1.0

    def _unsettled(self) -> list[int]:
        """Rows whose exchange is under way or still to be tried."""
        return self._schedule.beside(self._current.intent if self._current is not None else None)
