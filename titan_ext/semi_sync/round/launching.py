"""What a site means to do in a round: its rules, its weight, and what it tells the others of itself."""

from collections.abc import Sequence

from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.schedule import Progress, StepTimer
from titan_ext.semi_sync.plan.weighting import UNKNOWN, OwnWork, Standing
from titan_ext.semi_sync.round.box import told
from titan_ext.semi_sync.round.participation import Participation
from titan_ext.semi_sync.round.round import Launch, Role


class RoundLauncher:
    """Makes the launches of a rank.

    Args:
        plan: what the sites exchange.
        progress: of the site.
        participation: whether it takes part.
        timer: of its inner steps.
        site_weight: its weight under ``weighting = "site"``.
    """

    def __init__(
        self, plan: SyncPlan, progress: Progress, participation: Participation, timer: StepTimer, site_weight: float
    ) -> None:
        self.weight_factor = 1.0
        """Multiplies the site's weight."""
        self._plan, self._progress, self._participation = plan, progress, participation
        self._sources = participation.sources
        self._timer, self._site_weight = timer, site_weight
        self._step_time_ms = 0

    def launch_gradients(self, rules: Sequence[int], step: int, tokens: int) -> Launch:
        """The gradients of an inner step that is under way.

        Args:
            rules: of the gradients.
            step: the inner step.
            tokens: that they are of; 0 where the site does not take the step.
        """
        role = Role.MEMBER if tokens else Role.SITTING_OUT
        return Launch(role=role, rules=tuple(rules), step=step, weight=float(tokens), tokens=tokens)

    def launch(self, rules: Sequence[int], role: Role = Role.MEMBER) -> Launch:
        """What the site means to do now; a member that was not sampled sits out."""
        done = self._participation.all_sent
        if not self._participation.launch(rules) and role is Role.MEMBER:
            role = Role.SITTING_OUT
        return Launch(
            role=role,
            rules=tuple(rules),
            step=self._progress.step,
            weight=self.weight(rules) if role is Role.MEMBER else 0.0,
            sources=self._sources.count,
            tokens=self._progress.tokens,
            work={index: self._progress.work.get(index, (0, 0)) for index in rules},
            standing=self._standing(),
            pace=told(self._participation.box.pace(self._progress.tokens)),
            step_time_ms=self._take_step_time(),
            weights=self._weights() if role is Role.MEMBER else {},
            staleness=dict(self._progress.staleness),
            done=done,
        )

    def weight(self, rules: Sequence[int]) -> float:
        """What the work that the rules bring weighs, by the plan's policy."""
        # One weight a round; its first rule is of the parameters where any is.
        tokens, steps = self._progress.work.get(rules[0], (0, 0)) if rules else (0, 0)
        if self._sources.in_use:
            tokens, steps = self._sources.tokens, self._sources.steps
        fixed = self._site_weight * self._sources.current.weight
        work = OwnWork(fixed=fixed, tokens=tokens, steps=steps)
        return self._plan.weighting.own_weight(work) * self.weight_factor

    def _weights(self) -> dict[int, float]:
        """By rule, for a site that comes late and learns the rules from the others."""
        rules = range(len(self._plan.rules)) if self._plan.lateness.keeps_work else ()
        return {index: self.weight([index]) for index in rules}

    def _standing(self) -> Standing:
        loss = self._progress.loss
        merit = self._plan.weighting.merit(loss) if loss >= 0 else UNKNOWN
        return Standing(loss=loss, merit=merit, share=self._progress.share)

    def _take_step_time(self) -> int:
        """Milliseconds of an inner step; of a site that has just sat out, what the last ones took it."""
        self._step_time_ms = self._timer.take_milliseconds() or self._step_time_ms
        return self._step_time_ms
