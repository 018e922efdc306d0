"""What a run of the transfer depends on, and what it finds."""

from dataclasses import dataclass
from math import inf

ARMS = ("mup", "standard")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of all runs."""

    base_dim: int
    layers: int
    steps: int
    batch: int
    length: int
    corpus: str
    device: str
    sites: int = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One run's."""

    loss_whole: float | None
    tokens_sha256: str
    seconds: float

    @property
    def loss(self) -> float:
        """On text that is not trained on, nats a token; infinite for a run that diverged."""
        return inf if self.loss_whole is None else self.loss_whole


def method_of(arm: str, dim: int) -> str:
    """The name of a run's method: an arm at a width."""
    return f"{arm}_{dim}"


def arm_and_dim(method: str) -> tuple[str, int]:
    """What ``method_of`` was called with."""
    arm, _, dim = method.rpartition("_")
    return arm, int(dim)
