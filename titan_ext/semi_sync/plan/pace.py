"""How long a site's inner steps take."""

import math
import time


class Pace:
    """A clock that runs from ``start``, after a step's round if there was one, to ``stop``, after the next inner step."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0
        self._steps = 0

    def start(self) -> None:
        """An inner step begins."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """It is over; the first one, of which the beginning is not known, does not count."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._steps += 1

    def milliseconds(self) -> int:
        """Of a step, on average since the last call, rounded up; 0 without any."""
        mean = 1000 * self._seconds / self._steps if self._steps else 0.0
        self._seconds, self._steps = 0.0, 0
        return math.ceil(mean)
