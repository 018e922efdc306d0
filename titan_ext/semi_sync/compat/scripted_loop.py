"""The outer loop as torchft's classes drive it: it goes by the manager's step and never joins."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from titan_ext.errors import UserError
from titan_ext.semi_sync.compat.torchft_manager import ScriptManager
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.engine import SemiSync
from titan_ext.semi_sync.round.agreement import Position
from titan_ext.semi_sync.round.differences import InCommon, differences
from titan_ext.semi_sync.round.round import RoundResult
from titan_ext.semi_sync.state.tensors import NamedState


class ScriptedLoop(SemiSync):
    """An outer loop whose place in the run is the number of the manager's commits.

    The caller asks for a quorum, then calls ``launch()``, and ``land()`` after as many inner steps as
    the plan's delay. Each site is a member of every round. One that is behind has taken over a peer's
    state within the quorum, so that what it contributes is measured from there.

    Args:
        config: the method and its settings.
        model: the whole model, or a container of its fragments.
        optimizer: the inner one.
        manager: the script's.
        outer_optimizers: the script's, for each fragment.
        keep_local_work: as of ``SemiSync``.

    Raises:
        ValueError: a setting is wrong.
    """

    def __init__(
        self,
        config: SemiSyncConfig,
        model: nn.Module,
        optimizer: Optimizer,
        manager: ScriptManager,
        *,
        outer_optimizers: Sequence[Optimizer] | None = None,
        keep_local_work: bool,
    ) -> None:
        super().__init__(
            config,
            model_parts=[model],
            optimizers=optimizer,
            manager=manager,
            outer_optimizers=outer_optimizers,
            keep_local_work=keep_local_work,
            register=False,
        )
        self._script = manager
        self.spacing = config.sync_every // self.plan.num_fragments
        """Inner steps between two syncs, of whatever fragment."""
        self.launch_step = self.spacing - config.fragment_sync_delay
        """Inner step since the last sync after which the next one begins."""
        self._begun = False
        self._has_met = False
        """Whether a round with the other sites has been committed."""

    @property
    def fragment(self) -> int:
        """Whose turn it is."""
        return self._script.commits % self.plan.num_fragments

    def begin(self) -> None:
        """Before each inner step: the first one starts from the parameters as they are now, whatever loaded them."""
        if not self._begun:
            # Checkpoints of a run under way may differ; a model that it begins from may not.
            self._start_from_parameters(None if self._script.commits == 0 else False)
            self._begun = True

    def stand_at_commits(self) -> None:
        """Be where the manager is. Around a quorum: it tells whether a peer that loads its state into us is further."""
        self._exchange.lineage.position = Position(round=self._script.commits)

    def launch(self) -> None:
        """Exchange the fragment whose turn it is, and apply it if the plan has no delay."""
        self.stand_at_commits()
        # Inner steps of the sites may differ in number; the schedule is one of commits.
        self.inner_step = self._script.commits * self.spacing + self.launch_step - 1
        for state in self._states:
            if state.key == f"params/{self.fragment}":
                self._script.announce(state.tensors.shapes)
        self.step()

    def land(self) -> None:
        """Apply what is under way."""
        if self._in_flight.under_way:
            self.inner_step = self._in_flight.apply_at - 1
            self.step()

    def _settle(self, result: RoundResult) -> bool:
        committed = super()._settle(result)
        self._has_met |= committed
        # Who has long been in the run goes on without a stranger.
        if result.verdict.refused and not self._has_met:
            raise UserError(result.verdict.problem)
        return committed

    # -- a peer's state ------------------------------------------------------------------------------

    def states(self, *, parameters: bool) -> dict[str, NamedState]:
        """Live shared state by rule: that of trained parameters, or of all else."""
        return {
            state.key: state.shared_state() for state in self._states if state.key.startswith("params/") == parameters
        }

    def facts(self) -> dict[str, Any]:
        """What a peer has to know beside tensors."""
        return {"in_common": self._exchange.in_common.encoded(), "origin": self._exchange.lineage.origin}

    def take_facts(self, facts: Mapping[str, Any]) -> None:
        """Those of a peer whose state is about to come.

        Raises:
            UserError: it runs another plan or model; names what differs.
        """
        theirs = InCommon.decoded(facts["in_common"])
        differing = differences([self._exchange.in_common, theirs], ["this site", "its peer"])
        if differing:
            raise UserError(f"the sites differ in their arguments or model: {differing}")
        if self._is_behind:
            self._exchange.lineage.origin = facts["origin"]

    def take_states(self, states: Mapping[str, NamedState], registered: Collection[str]) -> None:
        """A peer's shared state by rule becomes this site's, at once.

        The local parameters are left to the script, which loads the peer's. Where it registered nothing with the
        manager, they become the global ones, or, at a site that is not behind, keep their distance to them.

        Args:
            states: by rule.
            registered: keys in the manager's state that are ours.
        """
        scripted = self._script.loads_more_than(registered)
        for state in self._states:
            if state.key not in states:
                continue
            theirs = states[state.key]
            if scripted:
                state.load(state.shared_state(), theirs)
            elif self._is_behind:
                state.load_shared_state(theirs)
            else:
                state.correct_shared_state(theirs)
        self._begun = True
        self._exchange.lineage.checksum = 0  # that of what was replaced
        self._committer.checksum.forget()

    @property
    def _is_behind(self) -> bool:
        """Within a quorum that brings a peer's state: the manager stands where the peer does already."""
        return self._exchange.lineage.position.round != self._script.commits
