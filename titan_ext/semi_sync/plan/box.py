"""The box of a round: how many inner steps each site takes in it, where sites are unequal.

Dynamic local updates (DyLU, arXiv 2401.09135) by the time model of Pollen (arXiv 2306.17453): the slower site takes fewer
steps, so that all come to the exchange together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from titan_ext.semi_sync.plan.time_model import TimeModel


@dataclass(frozen=True, slots=True)
class Pace:
    """What a site tells the others of its speed."""

    times: TimeModel | None = None
    """Of its inner steps in a round; None before it has measured any, or if it takes none."""
    step_tokens: float = 0.0
    """Tokens of an inner step."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a round may take."""

    steps: list[int]
    """Of each site, at least 1."""
    seconds: float | None = None
    """After which a site ends its part, wherever it is; None: there is no such time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """What ends a round at a site. Its steps count the same in the run, whether a site takes them or not."""

    kind: Literal["steps", "speed", "seconds", "tokens"] = "steps"
    """All take the same steps; as many as in the time of the fastest site; as many as in some seconds; as many as make
    some tokens."""
    steps: int = 1
    """Inner steps of a round, which no site exceeds."""
    size: float = 0.0
    """Seconds or tokens, where the kind is one of them."""
    grace: float = 0.0
    """Share by which the time may grow, for steps that would otherwise just not fit."""

    def budgets(self, sites: Sequence[Pace]) -> Budgets:
        """The steps of each site. Pure: equal tables lead to equal budgets.

        Args:
            sites: all of the next round, in their order; those of unknown speed take all steps.
        """
        if self.kind == "tokens":
            return Budgets([self._for_tokens(site) for site in sites])
        known = [site for site in sites if site.times is not None]
        if self.kind == "steps" or not known:
            return Budgets([self.steps] * len(sites))
        time = self.size if self.kind == "seconds" else min(site.times.seconds(self.steps) for site in known)
        best = max(self._ends(known, time), key=lambda end: (self._rate(known, end), -end))
        return Budgets([self._within(site, best) for site in sites], time * (1 + self.grace))

    def _for_tokens(self, site: Pace) -> int:
        if site.step_tokens <= 0:
            return self.steps
        return max(1, min(self.steps, -int(-self.size // site.step_tokens)))

    def _within(self, site: Pace, seconds: float) -> int:
        return self.steps if site.times is None else max(1, site.times.batches_within(seconds, self.steps))

    def _ends(self, sites: Sequence[Pace], time: float) -> list[float]:
        """When a round may end: in time, or, within the grace, as a site finishes one more step."""
        ends = [time]
        for site in sites:
            steps = self._within(site, time) + 1
            while steps <= self.steps and site.times.seconds(steps) <= time * (1 + self.grace):
                ends.append(site.times.seconds(steps))
                steps += 1
        return ends

    def _rate(self, sites: Sequence[Pace], end: float) -> float:
        """Tokens a second of all sites together in a round that ends then and waits for the last one."""
        steps = [self._within(site, end) for site in sites]
        longest = max(site.times.seconds(count) for site, count in zip(sites, steps, strict=True))
        tokens = sum(count * site.step_tokens for count, site in zip(steps, sites, strict=True))
        return tokens / longest if longest > 0 else 0.0
