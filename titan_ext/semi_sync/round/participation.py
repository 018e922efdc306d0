"""Whether a site trains and contributes: it may not be sampled, have done its part, or its data may have ended."""

from collections.abc import Collection, Sequence
from typing import Any

from titan_ext.semi_sync.plan.plan import SiteSampling
from titan_ext.semi_sync.plan.rule import PARAMETERS
from titan_ext.semi_sync.plan.sampling import sampled_sites
from titan_ext.semi_sync.round.box import RoundBox
from titan_ext.semi_sync.round.round import Role, RoundResult
from titan_ext.semi_sync.sources.turns import SourceTurns
from titan_ext.semi_sync.state.synced_state import SyncedState


class Participation:
    """A site that sits out takes no inner steps; it counts them and stays in the rounds, so that the others go on.

    Sampling (DEPT, arXiv 2410.05021, section 2.1; FedAvg, arXiv 1602.05629): only some sites train in each round, and
    those contribute.

    End of data: a site whose data has ended contributes what it has done since the last round of each part of the
    model, then nothing. The run is over when no site has anything to contribute any more.

    Args:
        states: the plan's rules bound to this rank.
        sampling: how sites are sampled.
        name: of this site.
        box: what ends its part of a round.
        sources: its data sources, some of which train in a round.

    Raises:
        ValueError: sites are to be sampled, and this one has no name.
    """

    def __init__(
        self, states: Sequence[SyncedState], sampling: SiteSampling, name: str, box: RoundBox, sources: SourceTurns
    ) -> None:
        if sampling.sites_per_round is not None and not name:
            raise ValueError("sites_per_round: sites are sampled by name; give site_name")
        self._sampling, self._name, self.sources = sampling, name, sources
        self._is_sampled = True
        self.box = box
        self._keys = [state.key for state in states]
        self._final = {index for index, state in enumerate(states) if state.rule.final}
        self._parameters = {index for index, state in enumerate(states) if state.rule.state == PARAMETERS} - self._final
        self._unsent: set[int] = set()
        self.data_ended = False
        """Whether this site takes no more inner steps."""
        self.run_is_over = False
        """Whether the last round found no site that had anything to contribute."""

    @property
    def sits_out(self) -> bool:
        """Whether this site takes no inner steps at present."""
        return self.data_ended or not self._is_sampled or self.box.is_full or self.sources.sits_out

    @property
    def all_sent(self) -> bool:
        """Whether this site has nothing to contribute any more."""
        return self.data_ended and not self._unsent

    def count_step(self) -> None:
        """An inner step of the run is over; if this site took it, every part of the model has changed."""
        if not self.sits_out:
            self._unsent = set(self._parameters)
            self.box.count_step()

    def launch(self, rules: Collection[int]) -> bool:
        """A round takes these rules along; whether that has something of this site's to bring.

        A mean at the end takes in every site that is sampled.
        """
        contributes = not self.data_ended or not (self._unsent | self._final).isdisjoint(rules)
        self._unsent -= set(rules)
        return self._is_sampled and not self.sources.sits_out and contributes

    def after_round(self, result: RoundResult, rank: int, committed: bool) -> None:
        """A round has ended: sample anew, and see whether the run is over. All its sites come to the same answers.

        Args:
            result: with the statuses of its sites.
            rank: this site's place among them.
            committed: otherwise what it took along is to be sent again.
        """
        table, sampling = result.verdict.table, self._sampling
        if committed and sampling.sites_per_round is not None:
            round_ = result.verdict.step // sampling.period
            names = [site.name for site in table]
            self._is_sampled = self._name in sampled_sites(names, sampling.sites_per_round, sampling.seed, round_)
        if result.healed and result.role is not Role.LATE:
            self._unsent.clear()  # local work was dropped for a peer's state
        elif not committed or result.keeps_work:
            self._unsent |= self._parameters & set(result.launch.rules)
        if result.rules:
            self.box.after_round(table, rank, committed)
        elif committed:
            self.box.begin()
        self.sources.after_round(result, committed)
        self.run_is_over = committed and bool(result.rules) and all(site.done for site in table)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        unsent = [self._keys[index] for index in sorted(self._unsent)]
        return {"reached": self.data_ended, "unsent": unsent, "box": self.box.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        unsent = set(state["unsent"])
        self.data_ended = state["reached"]
        if "box" in state:  # checkpoints did not always have one
            self.box.load_state_dict(state["box"])
        self._unsent = {index for index, key in enumerate(self._keys) if key in unsent}
