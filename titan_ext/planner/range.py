"""Numbers that are not known exactly."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """What a number is likely to be, and between which bounds it is expected."""

    low: float
    likely: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> "Range":
        """A number that is known."""
        return cls(value, value, value)

    @classmethod
    def around(cls, likely: float, below: float, above: float) -> "Range":
        """``likely`` with bounds ``below`` and ``above`` times as much."""
        return cls(likely * below, likely, likely * above)

    def map(self, function: Callable[[float], float]) -> "Range":
        """A rising function of the number."""
        return Range(function(self.low), function(self.likely), function(self.high))

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high
