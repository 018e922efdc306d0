"""Studies with thousands of sources on a few virtual sites of one process (Pollen, arXiv 2306.17453).

Each virtual site has one model, on any device, and the real outer loop. In a round it trains the sources that are placed
on it one after the other, from the global parameters, and adds up what they come to; the outer loop exchanges the virtual
sites' means. So memory goes with the virtual sites, not with the sources, and a round's bytes are one model a site.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from titan_ext.errors import UserError
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.engine import SemiSync
from titan_ext.semi_sync.plan.sampling import sampled_sources
from titan_ext.semi_sync.plan.time_model import MeasuredTimes
from titan_ext.semi_sync.sources.placement import Worker, place, round_robin
from titan_ext.semi_sync.testing.simulator import InProcessSites

Train = Callable[[nn.Module, int, int], float]
"""``train(model, source, round)`` trains the model in place and returns the source's weight in the round's mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PopulationRound:
    """What a round took."""

    sources: list[int]
    """Those that trained."""
    placed: list[list[int]]
    """By virtual site."""
    busy_seconds: list[float]
    """Of each virtual site, in its sources."""
    seconds: float
    """Of the whole round, its exchange included."""

    @property
    def idle(self) -> float:
        """Part of the virtual sites' time in which they waited for the one that was busy longest."""
        longest = max(self.busy_seconds)
        return 1 - sum(self.busy_seconds) / (len(self.busy_seconds) * longest) if longest else 0.0


class Population:
    """Sources of many sizes, trained by few virtual sites.

    Args:
        config: the outer loop between virtual sites; a round is one step of it, so ``sync_every`` counts rounds and is 1.
            The sources' weights decide in the mean, whatever ``weighting`` says.
        models: one for each virtual site, on its device, all with equal parameters.
        sizes: batches of each source, by which they are placed.
        train: trains one source; called from several threads at once, each with a model of its own.
        per_round: how many sources a round draws; None: all.
        seed: of the draws.
        learns: whether sources are placed by the time that they take; if not, they are dealt out in turn.

    Raises:
        UserError: there is no source, or rounds are not those of the outer loop.
    """

    def __init__(
        self,
        config: SemiSyncConfig,
        models: Sequence[nn.Module],
        sizes: Sequence[int],
        train: Train,
        *,
        per_round: int | None = None,
        seed: int = 0,
        learns: bool = True,
    ) -> None:
        if config.sync_every != 1:
            raise UserError(f"sync_every = {config.sync_every}: must be 1, a round of the population")
        if not sizes:
            raise UserError("sizes = []: must be the batches of at least one source")
        self._models, self._sizes, self._train = models, sizes, train
        self._per_round, self._seed, self._learns = per_round, seed, learns
        self._times = [MeasuredTimes() for _ in models]
        self._workers = [Worker(f"virtual site {at}", times.seconds) for at, times in enumerate(self._times)]
        self._sites = InProcessSites(len(models))
        self.outer: list[SemiSync] = self._sites.outer_loops(config, models)
        """The virtual sites' outer loops."""
        self._rounds = 0

    def round(self) -> PopulationRound:
        """Draw, place and train the sources of a round, and exchange what they came to."""
        started = time.perf_counter()
        drawn = sampled_sources(len(self._sizes), self._per_round, self._seed, self._rounds)
        sizes = [self._sizes[source] for source in drawn]
        placed = (place if self._learns else round_robin)(sizes, self._workers)
        by_site = [[drawn[each] for each in indices] for indices in placed]
        busy = self._sites.at_once(lambda at: self._turns(at, by_site[at]))
        for times in self._times:
            times.end_round()
        self._rounds += 1
        return PopulationRound(sources=drawn, placed=by_site, busy_seconds=busy, seconds=time.perf_counter() - started)

    def global_parameters(self) -> Mapping[str, torch.Tensor]:
        """The last value that all virtual sites share."""
        return self.outer[0].global_parameters()

    def close(self) -> None:
        """End the virtual sites' threads."""
        self._sites.at_once(lambda at: self.outer[at].finish())
        self._sites.close()

    def _turns(self, at: int, sources: Sequence[int]) -> float:
        """One virtual site's part of a round; returns the seconds that its sources took."""
        model, outer, times = self._models[at], self.outer[at], self._times[at]
        parameters = [each.detach() for each in model.parameters() if each.requires_grad]  # sharing their memory
        begin = [each.clone() for each in parameters]
        sums = [torch.zeros_like(each) for each in begin]
        total, busy = 0.0, 0.0
        for source in sources:
            started = time.perf_counter()
            weight = self._train(model, source, self._rounds)
            taken = time.perf_counter() - started
            times.observe(self._sizes[source], taken)
            total, busy = total + weight, busy + taken
            with torch.no_grad():
                torch._foreach_add_(sums, parameters, alpha=weight)
                torch._foreach_copy_(parameters, begin)
        if total > 0:
            with torch.no_grad():
                torch._foreach_copy_(parameters, torch._foreach_div(sums, total))
        outer.weight_factor = total
        outer.step()
        return busy
