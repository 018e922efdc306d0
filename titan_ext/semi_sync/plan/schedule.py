"""What is due, what is still to be tried again, and where a site stands between two rounds."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.rule import not_in_vain
from titan_ext.semi_sync.plan.weighting import UNKNOWN


@dataclass(slots=True)
class Progress:
    """Counters of one site."""

    step: int = 0
    """Inner steps of the run so far; all sites share them."""
    tokens: int = 0
    """What this site has trained on since its last commit."""
    work: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By rule tokens and inner steps of this site since the last commit of what the rule covers."""
    staleness: dict[int, int] = field(default_factory=dict)
    """By rule commits that have gone by since what this site has still to bring began, but for the last one; where there
    are any."""
    loss: float = UNKNOWN
    """Of the model as the site last received it, on its own held-out text, where the plan weighs sites by it."""
    share: float = UNKNOWN
    """What the policy of the sites' weights had this site remember."""

    def settle_work(self, sent: Mapping[int, tuple[int, int]], rules: Iterable[int]) -> None:
        """What a round has brought is done; what was done during its flight counts in the next one of its rules.

        Args:
            sent: by rule tokens and inner steps that the round brought; all there is of a rule that is not among them.
            rules: of the round.
        """
        for index in rules:
            tokens, steps = self.work.get(index, (0, 0))
            sent_tokens, sent_steps = sent.get(index, (tokens, steps))
            self.work[index] = (tokens - sent_tokens, steps - sent_steps)


class StepTimer:
    """How long a site's inner steps take: from ``start``, after a step's round, to ``stop``, after the next inner step.

    Args:
        now: seconds that do not go back.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._since: float | None = None
        self._seconds = 0.0
        self._steps = 0

    def pause(self) -> None:
        """What comes now is no inner step of this site."""
        self._since = None

    def start(self) -> None:
        """An inner step begins."""
        self._since = self._now()

    def stop(self, taken: bool = True) -> None:
        """It is over; the first one, of which the beginning is not known, does not count, nor one that was not taken."""
        if taken and self._since is not None:
            self._seconds += self._now() - self._since
            self._steps += 1

    def take_milliseconds(self) -> int:
        """Of a step, on average since the last call, rounded up; 0 without any."""
        mean = 1000 * self._seconds / self._steps if self._steps else 0.0
        self._seconds, self._steps = 0.0, 0
        return math.ceil(mean)


class Schedule:
    """The rules of a plan that wait for a round.

    Args:
        plan: the method's plan; rules are named by their place in it.
        rules: those that this schedule sees to; None: all.
        only_when_due: try again what waits when more falls due, and not before. The inner step alone tells then when a
            site comes to a round. Sites that meet in several quorums need that: one that tried again by itself would wait
            in one of them for a site that waits for it in another.
    """

    def __init__(self, plan: SyncPlan, rules: Collection[int] | None = None, only_when_due: bool = False) -> None:
        self.pending: list[int] = []
        self._plan = plan
        self._rules = range(len(plan.rules)) if rules is None else rules
        self._only_when_due = only_when_due
        self._finished = False
        self.not_before = 0
        """Inner step until which what waits may wait, unless more falls due."""

    def advance(self, step: int) -> bool:
        """Add what is due after inner step ``step``; whether a round is to see to what waits."""
        due = [index for index in self._plan.due(step) if index in self._rules]
        if due:
            self.not_before = 0
        self.pending = _union(self.pending, due)
        return bool(due) or self.is_ready(step)

    def is_ready(self, step: int) -> bool:
        """Whether a round is to see to what waits after inner step ``step``, though nothing more falls due."""
        return bool(self.pending) and step >= self.not_before and not self._only_when_due

    def finish(self, step: int) -> bool:
        """Add what is due after the last inner step; whether a round is to see to it, or to what was put off."""
        rules = [] if self._finished else [index for index in self._plan.final() if index in self._rules]
        self._finished = True
        put_off = bool(self.pending) and not self.is_ready(step)
        self.pending = _union(self.pending, rules)
        return bool(rules) or put_off

    def take_turn(self, commits: Mapping[str, int]) -> list[int]:
        """One of those that wait has a round now: of the fragment whose turn it is, whichever fell due here.

        Sites that train on come to their rounds at different steps; what all of them know is what the rounds before have
        brought.
        """
        turn = self._plan.next_in_turn(commits)
        served = self._plan.rules[self.pending[0]].offset if self.pending else None
        self.pending = [index for index in self.pending if self._plan.rules[index].offset != served]
        self.not_before = 0
        return turn

    def catch_up(self, step: int, to: int) -> None:
        """Add what falls due as the count of inner steps moves on to that of the others."""
        for each in range(step + 1, to + 1):
            self.pending = _union(self.pending, self._plan.due(each))

    def take(self) -> list[int]:
        """All that waits, which a round now sees to."""
        # An average of regions that waits from a failed round must not undo what all sites agree on now.
        taken, self.pending = not_in_vain(self._plan.rules, self.pending), []
        self.not_before = 0
        return taken

    def again(self, rules: Iterable[int]) -> None:
        """Try rules of a round that was not committed once more, those that are to be retried."""
        self.pending = _union([index for index in rules if self._plan.rules[index].retry], self.pending)

    def replace(self, rules: Iterable[int]) -> None:
        """Have wait what waits at a peer, should its round fail."""
        self.pending = []
        self.again(rules)

    def settle(self, rules: Iterable[int]) -> None:
        """Forget rules that a round has brought."""
        self.pending = [index for index in self.pending if index not in set(rules)]

    def beside(self, rules: Iterable[int]) -> list[int]:
        """``rules`` of a round under way, and all that waits."""
        return _union(list(rules), self.pending)

    def keys(self, rules: Iterable[int]) -> list[str]:
        """Keys of rules, which outlive a change of their order."""
        return [self._plan.rules[index].key for index in rules]

    def indices(self, keys: Iterable[str]) -> list[int]:
        """The inverse of ``keys``; without those that the plan does not have."""
        known = {rule.key: index for index, rule in enumerate(self._plan.rules)}
        return [known[key] for key in keys if key in known]


def _union(first: list[int], second: list[int]) -> list[int]:
    return first + [index for index in second if index not in first]
