"""A site's training steps, thinned where there are many."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from titan_ext.instruments.lines import number

MOST_POINTS = 4000
RECENT_POINTS = 256


@dataclass(frozen=True, slots=True)
class Point:
    """One inner step; None for what is not known."""

    step: int
    time: float | None
    """Of the clock, in seconds."""
    loss: float | None
    """None also for a loss that is no number, see ``is_finite``."""
    tokens: float | None
    bytes_sent: int | None
    """By the site's rounds up to this step, as far as their lines say so."""
    tokens_per_second: float | None
    lr: float | None
    grad_norm: float | None
    is_finite: bool = True


_READ = [each.name for each in fields(Point) if each.name not in ("step", "bytes_sent", "is_finite")]


def point(record: Mapping[str, Any], bytes_sent: int | None) -> Point | None:
    """The point of a step's line; None where it has no step."""
    step = record.get("step")
    if not isinstance(step, int) or step < 0:
        return None
    # A journal writes null for a loss that is a NaN or an infinity.
    not_finite = "loss" in record and record["loss"] is None
    return Point(
        step, bytes_sent=bytes_sent, is_finite=not not_finite, **{key: number(record.get(key)) for key in _READ}
    )


class Curve:
    """Points by rising steps.

    A point whose step is not above the last one belongs to a run that was resumed: what was trained beyond it has been
    lost and is trained again, so it takes the place of the points from there on.
    """

    def __init__(self) -> None:
        self._kept: list[Point] = []
        self._every = 1
        self._recent: deque[Point] = deque(maxlen=RECENT_POINTS)
        self.steps_repeated = 0
        """Inner steps that were taken more than once."""

    def add(self, new: Point) -> None:
        """Append a point."""
        if self._recent and new.step <= self._recent[-1].step:
            self.steps_repeated += self._recent[-1].step - new.step + 1
            self._drop_from(new.step)
        self._recent.append(new)
        if not self._kept or new.step - self._kept[-1].step >= self._every:
            self._kept.append(new)
        if len(self._kept) > MOST_POINTS:
            self._every *= 2
            self._kept = self._kept[::2]

    @property
    def last(self) -> Point | None:
        """The latest step."""
        return self._recent[-1] if self._recent else None

    @property
    def recent(self) -> Sequence[Point]:
        """The latest steps, none left out."""
        return list(self._recent)

    def points(self, most: int = MOST_POINTS) -> list[Point]:
        """The whole curve in at most so many points, the latest one among them."""
        stride = max(1, -(-len(self._kept) // most))
        thinned = self._kept[::stride]
        if self.last is not None and thinned[-1] is not self.last:
            thinned.append(self.last)
        return thinned

    def _drop_from(self, step: int) -> None:
        self._kept = [each for each in self._kept if each.step < step]
        self._recent = deque((each for each in self._recent if each.step < step), maxlen=RECENT_POINTS)
