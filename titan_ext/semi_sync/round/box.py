"""A site's part of a boxed round: how far it is, how long it takes, and when it has done enough."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch

from titan_ext.semi_sync.plan.box import Box, Budgets, Pace
from titan_ext.semi_sync.plan.time_model import MeasuredTimes, TimeModel
from titan_ext.semi_sync.round.agreement import SiteStatus
from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.site.ranks import SiteRanks

MICROSECONDS = 1_000_000

# Looks at the clock in a round, at each of which the ranks of a site meet.
_LOOKS = 8
# A round that takes so many times what was expected, or that part of it, is of another speed, unless most of it went as
# expected: then something has held it up. Of another speed the old one is forgotten.
_CHANGED = 1.5
_ROUNDS_REMEMBERED = 8


class RoundBox:
    """Counts the steps of this site's part and ends it.

    Ranks of a site come to the same answers: by the same count of steps, and by the clock of the first rank.

    Args:
        box: what ends a round.
        site: the ranks of the site.
        clock: what steps are timed by.
        device: where inner steps run.
    """

    def __init__(self, box: Box, site: SiteRanks, clock: Clock, device: torch.device) -> None:
        self._box, self._site, self._clock, self._device = box, site, clock, device
        self._times = MeasuredTimes(_ROUNDS_REMEMBERED)
        self._budget: int | None = None
        self._seconds: float | None = None
        self._taken = 0
        self._elapsed = 0.0
        self._looks: dict[int, float] = {}
        """Seconds elapsed at each look of the round, by the steps taken."""
        self._since: float | None = None
        """When the round began; None where that is not known, as after a resume."""
        self._is_late = False

    @property
    def is_full(self) -> bool:
        """Whether this site has done its part of the round."""
        return self._is_late or (self._budget is not None and self._taken >= self._budget)

    def count_step(self) -> None:
        """This site has taken an inner step. A collective over the site, now and then."""
        self._taken += 1
        if self._box.kind == "steps" or self._since is None:
            return
        if self._is_look():
            self._measure()
            self._is_late = self._seconds is not None and self._site.gather(self._elapsed)[0] > self._seconds

    def pace(self, tokens: int) -> Pace:
        """What this site tells of its speed at the end of its part. A collective over the site.

        Args:
            tokens: that it has trained on in the round.
        """
        if self._box.kind == "steps":
            return Pace()
        if self._since is not None and self._taken and not self.is_full:
            self._measure()  # the last step was no look: the round has come before this site's part was over
        taken, elapsed, usual, tokens = self._site.gather((self._taken, self._elapsed, self._usual(), tokens))[0]
        if self._since is not None and taken and elapsed > 0:
            self._observe(taken, elapsed, usual)
        return Pace(self._times.model, tokens / taken if taken else 0.0)

    def begin(self) -> None:
        """Sites that all join begin, or go on from checkpoints: with the round that they were in."""
        if self._budget is None and not self._taken:
            self._since = self._clock.now()

    def after_round(self, table: Sequence[SiteStatus], rank: int, committed: bool) -> None:
        """A round has ended, and the next begins.

        Args:
            table: the statuses of its sites.
            rank: this site's place in it.
            committed: otherwise this site trains on until a round is.
        """
        budgets = Budgets([])
        if committed and self._box.kind != "steps" and rank < len(table):
            budgets = self._box.budgets([pace_of(site) for site in table])
        self._budget = budgets.steps[rank] if budgets.steps else None
        self._seconds = budgets.seconds
        self._is_late = False
        if committed:
            self._taken, self._elapsed, self._looks, self._since = 0, 0.0, {}, self._clock.now()
        else:
            self._since = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "budget": self._budget,
            "taken": self._taken,
            "is_late": self._is_late,
            "times": self._times.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned; how long the round had lasted does not count."""
        self._budget, self._taken, self._is_late = state["budget"], state["taken"], state["is_late"]
        self._times.load_state_dict(state["times"])
        self._since = None

    def _is_look(self) -> bool:
        most = self._box.steps if self._budget is None else self._budget
        return self._taken == most or self._taken % max(1, most // _LOOKS) == 0

    def _measure(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._elapsed = self._clock.now() - cast(float, self._since)
        self._looks[self._taken] = self._elapsed

    def _usual(self) -> float:
        """What the round's steps take at the median speed between its looks: a pause in the midst of it is not seen."""
        spans = [
            (steps - before, end - start)
            for (before, start), (steps, end) in pairwise([(0, 0.0), *self._looks.items()])
        ]
        return self._taken * median(seconds / steps for steps, seconds in spans) if spans else 0.0

    def _observe(self, taken: int, elapsed: float, usual: float) -> None:
        expected = self._times.model.seconds(taken) if self._times.model is not None else elapsed
        if not any(expected / _CHANGED <= each <= expected * _CHANGED for each in (elapsed, usual)):
            self._times = MeasuredTimes(_ROUNDS_REMEMBERED)
        self._times.observe(taken, elapsed)


def told(pace: Pace) -> tuple[int, int, int, int]:
    """A pace as whole numbers: microseconds of the three terms, and tokens of 1000 steps."""
    times = pace.times or TimeModel()
    terms = (times.constant, times.logarithmic, times.linear)
    constant, logarithmic, linear = (round(MICROSECONDS * each) for each in terms)
    return constant, logarithmic, linear, round(1000 * pace.step_tokens)


def pace_of(site: SiteStatus) -> Pace:
    """The pace that a site told."""
    constant, logarithmic, linear, tokens = site.pace
    if site.done or not (constant or logarithmic or linear):
        return Pace(step_tokens=tokens / 1000)
    times = TimeModel(
        constant=constant / MICROSECONDS, logarithmic=logarithmic / MICROSECONDS, linear=linear / MICROSECONDS
    )
    return Pace(times, tokens / 1000)
