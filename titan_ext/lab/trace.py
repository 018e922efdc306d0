"""What came of a rehearsal, by site and in all."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from titan_ext.semi_sync.wire.ledger import RoundRecord


@dataclass(slots=True, kw_only=True)
class SiteTrace:
    """What happened at a site, over all its lives."""

    name: str
    started: float = 0.0
    """Seconds at which it had joined for the first time."""
    ended: float = 0.0
    """Seconds at which it took its last step or was over."""
    training_seconds: float = 0.0
    """In which it took inner steps, or sat out while others did."""
    away_seconds: float = 0.0
    """Between a kill and the next start."""
    steps: int = 0
    """Inner steps of the run that it has come to."""
    lives: int = 0
    rounds: list[tuple[float, RoundRecord]] = field(default_factory=list)
    """With the time at which each was over."""
    marks: list[tuple[float, int]] = field(default_factory=list)
    """Time and inner step before each round."""
    sent_bytes: float = 0.0
    error: str | None = None
    """Why it ended early."""

    @property
    def utilisation(self) -> float:
        """Share of the time that it was there in which it took inner steps."""
        there = self.ended - self.started - self.away_seconds
        return self.training_seconds / there if there > 0 else 0.0

    @property
    def committed(self) -> int:
        """Rounds that it has seen committed."""
        return sum(record.committed for _, record in self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a rehearsal."""

    sites: Sequence[SiteTrace]
    seconds: float
    """Until the last site was over."""
    finished: bool
    """Whether some site took the last inner step."""
    state_sha256: str
    """Of the shared state at the end."""
    longest_silence: float | None = None
    """Seconds between two heartbeats of a living site, where they came; None: not known."""
    clock: str = "virtual"
    """Whose seconds these are: "virtual" or "real"."""

    @property
    def utilisation(self) -> float:
        """Mean over the sites."""
        return sum(site.utilisation for site in self.sites) / len(self.sites)

    @property
    def participation(self) -> float:
        """Contributors of the committed rounds, as a share of all sites."""
        rounds = {
            record.round: record.participants for site in self.sites for _, record in site.rounds if record.committed
        }
        return sum(rounds.values()) / (len(rounds) * len(self.sites)) if rounds else 0.0
