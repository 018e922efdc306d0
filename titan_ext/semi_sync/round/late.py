"""A site that a round did not wait for: what it brings to a later one (Decoupled DiLoCo, arXiv 2604.21428).

The others commit without it. When it comes, it receives their state and moves its own parameters as far as the global ones
have moved meanwhile; what it has done since the older ones stays, and counts in a later round by its staleness: the commits of
the same part of the model that went by since that work began.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from titan_ext.semi_sync.plan.plan import Lateness
from titan_ext.semi_sync.plan.weighting import Standing
from titan_ext.semi_sync.round.agreement import Verdict
from titan_ext.semi_sync.round.contributions import Contribution
from titan_ext.semi_sync.round.round import Launch

Write = Callable[[Sequence[int], int, float, Standing], Contribution]
"""``ContributionWriter.write``."""


def late_contribution(launch: Launch, verdict: Verdict, written: Contribution | None, write: Write) -> Contribution:
    """What a late site puts into a round.

    Args:
        launch: what it meant to do.
        verdict: what the others exchange.
        written: its contribution of the launch, where the inner loop goes on meanwhile. It fits a round of the same rules
            alone, as an update of the global parameters is one of newer ones too; to another the site brings nothing.
        write: writes a contribution of the parameters as they are now.
    """
    rules = verdict.rules
    if written is None:
        return write(rules, verdict.step, launch.weights.get(rules[0], 0.0), launch.standing)
    return written if list(written.parts) == rules else write(rules, verdict.step, 0.0, launch.standing)


def discounted(
    contribution: Contribution, lateness: Lateness, before: Mapping[int, int], missed: Mapping[int, int]
) -> Contribution:
    """A contribution that tells its staleness and weighs by it; changed in place.

    Args:
        contribution: of this site.
        lateness: what becomes of late sites.
        before: by rule its staleness at the launch.
        missed: by rule the commits that have gone by since then.
    """
    staleness = max((before.get(rule, 0) + missed.get(rule, 0) for rule in contribution.parts), default=0)
    if not staleness or not contribution.weight:
        return contribution
    factor = lateness.factor(staleness)
    contribution.buffer.mul_(factor)
    return replace(contribution, weight=contribution.weight * factor, staleness=staleness)
