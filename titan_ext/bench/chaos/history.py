"""What became of each site: its steps, commits and interruptions by the wall clock, and what its processes held."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ext.launcher.results import JsonLinesFollower, SummaryFile


@dataclass(slots=True)
class Interruption:
    """A time in which a site could not take part, by a fault of its own."""

    since: float
    over: float = math.inf
    """When the cause was gone."""
    until: float = math.inf
    """When the site finished its first inner step after that."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process held after a round."""

    time: float
    pid: int
    round: int
    memory: int
    """Resident bytes of its own."""
    descriptors: int


class SiteHistory:
    """Everything known of one site; times are those of ``time.time``.

    Args:
        folder: the site's dump folder, in which there is nothing yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []
        self.samples: list[Sample] = []
        self.interruptions = [Interruption(-math.inf)]
        self.deaths: list[float] = []
        """Ends of processes that no fault of this site explains."""
        self.summary = SummaryFile(folder / "summary.json")
        self._metrics = JsonLinesFollower(folder / "metrics.jsonl")
        self._commits = JsonLinesFollower(folder / "commits.jsonl")

    @property
    def is_live(self) -> bool:
        """Whether it trains, as far as faults go."""
        return self.interruptions[-1].until < math.inf

    def was_live(self, moment: float) -> bool:
        """Whether it was not interrupted then."""
        return not any(each.since <= moment < each.until for each in self.interruptions)

    def interrupt(self) -> None:
        """A fault hits it."""
        self.interruptions.append(Interruption(time.time()))

    def recover(self) -> None:
        """What kept it from training is gone."""
        last = self.interruptions[-1]
        last.over = min(last.over, time.time())

    def poll(self) -> bool:
        """Read what it has written; returns whether there are new commits."""
        steps = [line for line in self._metrics.poll() if line.get("kind") == "step"]
        last = self.interruptions[-1]
        last.until = min([last.until, *(step["time"] for step in steps if step["time"] > last.over)])
        commits = self._commits.poll()
        self.steps += steps
        self.commits += commits
        return bool(commits)
