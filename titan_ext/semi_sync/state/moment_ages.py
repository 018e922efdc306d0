"""How many steps the moments stand for that sites average.

A site that had no gradient for a parameter, sat a round out or has just joined has taken fewer steps with it than the
others, so its moments hold less, and bias correction, which goes by the count, would take the mean for another. Sites
therefore tell their counts, agree on the moments *corrected* of their bias, and a site goes on with the highest count
once a round has brought all moments of a parameter. Where the counts are equal, this is the mean itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from titan_ext.semi_sync.state.views import ModelView

UNCOUNTED = -1
"""In place of a count that an optimizer does not keep."""


@dataclass(frozen=True, slots=True)
class Ages:
    """Step counts of the sites that a round averages, by parameter."""

    counts: Mapping[str, Sequence[int]]
    """Of each site."""
    weights: Sequence[float]
    """Of each site; 0 for one that contributes nothing, whose count does not matter."""
    whole: frozenset[str]
    """Parameters all of whose moments are in the round."""

    def weighted(self, weights: Sequence[float]) -> "Ages":
        """The same counts under other weights of the sites."""
        return replace(self, weights=weights)

    def settle(self, view: ModelView, state: str, name: str) -> float:
        """Give a parameter the count that its mean will have; returns the factor that makes the mean one of that count."""
        own, moment = view.steps(name), view.moment(state, name)
        weighed = [each for each in zip(self.weights, self.counts.get(name, ()), strict=False) if each[0] > 0]
        counts = [count for _, count in weighed]
        if own is None or moment is None or not counts or min(counts) == UNCOUNTED:
            return 1.0
        steps = max(counts) if name in self.whole else own
        if steps != own:
            view.set_steps(name, steps)
        if all(count == steps for count in counts):
            return 1.0
        held = math.fsum(weight * moment.mass(count) for weight, count in weighed)
        return moment.mass(steps) * math.fsum(weight for weight, _ in weighed) / held if held > 0 else 1.0
