"""What the outer loop takes time from, and lets it pass by; a simulation has its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds that do not go back, and a way to wait for some."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
