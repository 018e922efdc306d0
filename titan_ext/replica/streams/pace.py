"""A rate that sending is held to."""

import threading
import time
from collections.abc import Callable

_LEAST_BYTES = 1.0
"""Less than this is not waited for."""


class Pace:
    """A bucket of bytes that fills at a rate and may be overdrawn; for any number of threads.

    Args:
        rate: bytes a second; 0 sets no limit.
        burst_seconds: what may be sent at once after a pause, in seconds of the rate.
        clock: for tests.
    """

    def __init__(self, rate: float, burst_seconds: float = 0.05, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = rate * burst_seconds
        self._left = self._burst
        self._clock = clock
        self._at = clock()
        self._lock = threading.Lock()

    def seconds_to_wait(self) -> float:
        """Until something may be sent; 0 where that is now."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = self._clock()
            self._left = min(self._burst, self._left + (now - self._at) * self._rate)
            self._at = now
            return -self._left / self._rate if self._left < -_LEAST_BYTES else 0.0

    def spend(self, sent: int) -> None:
        """Take what has been sent out of the bucket."""
        with self._lock:
            self._left -= sent
