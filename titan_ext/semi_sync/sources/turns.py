"""One source after the other: who of a site's sources trains in a round, and what each begins with and leaves behind."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from titan_ext.errors import require
from titan_ext.semi_sync.plan.plan import SOURCES_NEED, SyncPlan
from titan_ext.semi_sync.plan.sampling import sampled_sources, turns_before
from titan_ext.semi_sync.plan.schedule import Progress
from titan_ext.semi_sync.plan.time_model import TimeModel
from titan_ext.semi_sync.round.agreement import SiteStatus
from titan_ext.semi_sync.round.round import RoundResult
from titan_ext.semi_sync.sources.bank import Bank
from titan_ext.semi_sync.sources.inner_states import InnerStates
from titan_ext.semi_sync.sources.placement import Worker, place
from titan_ext.semi_sync.sources.source import Source, Turn
from titan_ext.semi_sync.state.synced_state import SyncedState
from titan_ext.semi_sync.state.views import ModelView

logger = logging.getLogger(__name__)


class SourceTurns:
    """The sources of this site; a site without any is one source itself.

    In a round those that are drawn train in turn, each from the global parameters and for the inner steps of the round;
    what they come to is added up, and travels once (Photon, arXiv 2411.02908, section on clients and nodes).

    Args:
        plan: says how sources are drawn, and what of the inner optimizer outlasts a round.
        sources: this site's; with ``placement = "pollen"`` those of the run, in one order at all sites.
        name: of the site.
        states: the plan's rules bound to this rank.
        view: the model and its optimizers on this rank.
        bank: takes what each source comes to.
        progress: the site's counters.
        serve: told of each source that is about to train; the training loop gives it its data.

    Raises:
        ValueError: several sources, or sources drawn, with a plan whose rounds have no common end.
    """

    def __init__(
        self,
        plan: SyncPlan,
        *,
        sources: Sequence[Source],
        name: str,
        states: Sequence[SyncedState],
        view: ModelView,
        bank: Bank,
        progress: Progress,
        serve: Callable[[Turn], None],
    ) -> None:
        self._plan, self._of = plan, plan.sources
        self._sources = tuple(sources) or (Source(name=name),)
        self._name, self._states, self._view = name, states, view
        self.bank = bank
        self._progress, self._serve = progress, serve
        if self.in_use:
            check_plan(plan)
            names = [source.name for source in self._sources]
            require(len(set(names)) == len(names), "sources", names, "of different names")
            require(bool(name) or self._of.per_round is None, "site_name", name, "given where sources are drawn")
        self._stateless = self._of.optimizer == "stateless" or plan.reset_inner_optimizer
        keeps = len(self._sources) > 1 and not self._stateless
        self._inner = InnerStates(view, [source.name for source in self._sources]) if keeps else None
        self._steps = {source.name: 0 for source in self._sources}
        self._round: int | None = None
        self._turn: list[int] = list(range(len(self._sources)))
        self._place = 0
        self._first_step: int | None = None
        self._tokens_before = self._turn_steps = 0
        self._holder: str | None = self._sources[0].name  # whose states the optimizers hold
        self._drops_work = False  # of a source that a checkpoint was saved in the midst of, and that there is no more

    @property
    def in_use(self) -> bool:
        """Whether any of this concerns this run: several sources at this site, or sources that are drawn or stateless."""
        return len(self._sources) > 1 or not self._of.is_default

    @property
    def count(self) -> int:
        """Sources that this site has."""
        return len(self._sources)

    @property
    def sits_out(self) -> bool:
        """Whether none of the site's sources trains in this round."""
        return not self._turn

    @property
    def current(self) -> Source:
        """The source that trains now; of a site that sits out, its first."""
        return self._sources[self._turn[self._place] if self._turn else 0]

    @property
    def more(self) -> bool:
        """Whether another source of the site still has its turn in this round."""
        return self._place + 1 < len(self._turn)

    @property
    def under_way(self) -> bool:
        """Whether some source has taken a step of this round."""
        return self._first_step is not None

    @property
    def clock(self) -> int:
        """Inner step by which the learning rate of the next one goes."""
        if self._of.clock == "round":
            return self._progress.step - (self._progress.step if self._first_step is None else self._first_step)
        return self._progress.step if self._of.clock == "run" else self._steps[self.current.name]

    @property
    def tokens(self) -> int:
        """What the source that trains now has trained on in this round."""
        return self._progress.tokens - self._tokens_before

    @property
    def steps(self) -> int:
        """Inner steps that it has taken in this round."""
        return self._turn_steps

    def count_step(self, step: int) -> None:
        """The source has taken the inner step after ``step``."""
        if self._first_step is None:
            self._first_step = step
        if not self.sits_out:
            self._steps[self.current.name] += 1
            self._turn_steps += 1

    def end_turn(self, rules: Sequence[int], weight: float) -> int:
        """Add up what the source has come to, and let the next one begin where this one began. A collective over the site.

        Args:
            rules: of the round.
            weight: of the source that has had its turn.

        Returns:
            the inner step at which the next one begins.
        """
        if not self.bank.add(rules, self._progress.step, weight):
            logger.warning("source %s: its work is not finite; it is left out of the round", self.current.name)
            self._view.reset_broken_states()
        for state in self._states:
            state.reset_local_to_global()
        self._tokens_before, self._turn_steps = self._progress.tokens, 0
        self._place += 1
        first = self._progress.step if self._first_step is None else self._first_step
        self._begin_turn()
        return first

    def after_round(self, result: RoundResult, committed: bool) -> None:
        """A round has ended: draw the sources of the next one. All sites come to the same answers from the same table."""
        if not self.in_use:
            return
        if result.healed:
            self.bank.clear()
        if result.sum is not None and committed:
            self.bank.clear()
            self._tokens_before = self._turn_steps = 0
        index = result.verdict.step // self._plan.round_period
        if committed and (index != self._round or result.healed):
            self._draw(result.verdict.table, index)

    def _draw(self, table: Sequence[SiteStatus], index: int) -> None:
        self._round, self._place, self._first_step = index, 0, None
        self._tokens_before, self._turn_steps = self._progress.tokens, 0
        if self._drops_work:
            logger.warning(
                "the site's sources are not those of the checkpoint: the round begins anew from what sites share"
            )
            self._drops_work = False
            for state in self._states:
                state.reset_local_to_global()
        self._turn = self._placed(table, index) if self._of.placement == "pollen" else self._drawn(table, index)
        self._begin_turn()

    def _drawn(self, table: Sequence[SiteStatus], index: int) -> list[int]:
        """Of the sources of all sites, one site's after the other's in the order of their names."""
        sites = sorted(table, key=lambda site: site.name)
        everybody = [(site.name, source) for site in sites for source in range(site.sources)]
        drawn = sampled_sources(len(everybody), self._of.per_round, self._of.seed, index)
        return [source for site, source in (everybody[each] for each in drawn) if site == self._name]

    def _placed(self, table: Sequence[SiteStatus], index: int) -> list[int]:
        """Of the sources that any site can train, those that are placed here."""
        drawn = sampled_sources(self.count, self._of.per_round, self._of.seed, index)
        sites = sorted(table, key=lambda site: site.name)
        placed = place([self._plan.round_period] * len(drawn), [_worker(site) for site in sites])
        own = [site.name for site in sites].index(self._name)
        return sorted(drawn[each] for each in placed[own])

    def _begin_turn(self) -> None:
        if self.sits_out:
            return
        name = self.current.name
        if self._stateless:
            self._view.reset_optimizers()
        elif self._inner is not None and name != self._holder:
            if self._holder is not None:
                self._inner.keep(self._holder)
            self._inner.give(name)
        self._holder = name
        self._serve(Turn(source=name, skip_steps=self._skip()))

    def _skip(self) -> int | None:
        if self._of.reset_data:
            return 0
        if self._of.placement == "own":
            return None
        # Any site can have had the source: its place follows from the rounds that drew it.
        index = self._turn[self._place]
        turns = turns_before(index, self.count, self._of.per_round, self._of.seed, self._round or 0)
        return turns * self._plan.round_period

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "names": [source.name for source in self._sources],
            "round": self._round,
            "turn": self._turn,
            "place": self._place,
            "first_step": self._first_step,
            "tokens_before": self._tokens_before,
            "turn_steps": self._turn_steps,
            "steps": self._steps,
            "holder": self._holder,
            "weight": self.bank.weight,
        }

    def tensors(self) -> dict[str, Any]:
        """Tensors for a checkpoint, with global shapes; none where there is one source."""
        if self.count == 1:
            return {}
        inner = self._inner.checkpoint_state() if self._inner is not None else {}
        return {"bank": self.bank.checkpoint_state(), "inner": inner}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Take back what ``state_dict`` and ``tensors`` returned; where the sources are others, the round begins anew.

        Each source that there still is keeps its states and its count of steps.
        """
        own = [source.name for source in self._sources]
        self._steps |= {name: steps for name, steps in state["steps"].items() if name in self._steps}
        if self._inner is not None:
            self._inner.load_checkpoint_state(tensors.get("inner", {}))
        self._holder = state["holder"] if state["holder"] in own else None
        if state["names"] != own:
            self._drops_work = self.in_use
            return
        self._round, self._turn, self._place = state["round"], state["turn"], state["place"]
        self._first_step = state["first_step"]
        self._tokens_before, self._turn_steps = state["tokens_before"], state["turn_steps"]
        if self.count > 1:
            self.bank.load_checkpoint_state(tensors.get("bank", {}), state["weight"])


def check_plan(plan: SyncPlan) -> None:
    """Refuse sources where rounds have no common end, or sites exchange something of an inner optimizer.

    Raises:
        ValueError: saying what is needed.
    """
    if not plan.takes_sources:
        raise ValueError(f"several sources at a site: {SOURCES_NEED}")


def _worker(site: SiteStatus) -> Worker:
    """A site by what an inner step has taken it lately, as its status says: alike at all sites."""
    if not site.step_time_ms:
        return Worker(site.name)
    return Worker(site.name, TimeModel(linear=site.step_time_ms / 1000).seconds)
