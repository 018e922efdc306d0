"""What a comparison of methods is made with, and what a run of it came to."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from titan_ext import __version__


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a comparison share."""

    dim: int
    """Width of the model."""
    layers: int
    """Transformer blocks."""
    steps: int
    """Inner steps of a run; a multiple of ``sync_every``."""
    sites: int
    batch: int
    """Sequences that a site trains on in a step."""
    length: int
    """Tokens of a sequence."""
    sync_every: int
    """Inner steps between two averages of the parameters (K)."""
    rank: int
    """Rank of LoRDO and of low-rank data parallelism."""
    slow_beta: float
    """Decay rate of the slow momentum of MT-DAO and LoRDO."""
    omega: float
    """Weight of that momentum in MT-DAO; the rest is the gradient's."""
    corpus: str
    device: str


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    method: str
    lr: float
    seed: int

    def digest(self, settings: Settings, inner: object) -> str:
        """Short hash of all that a run depends on.

        Args:
            settings: those of the comparison.
            inner: what the method makes of them, as JSON values.
        """
        text = json.dumps([__version__, asdict(self), asdict(settings), inner], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to."""

    steps: list[int]
    """Inner steps after which the model was measured: right after a sync, when all sites hold the same."""
    losses: list[float | None]
    """Validation loss there, in nats a token; None where it is no number."""
    bytes_sent: list[int]
    """Bytes that a site had sent by then."""
    parameters: int
    tokens_sha256: str
    """Hash of all that the sites trained on, in order."""
    seconds: float
    cpu_seconds: float

    @property
    def loss(self) -> float:
        """The last validation loss; infinite for a run that diverged."""
        return math.inf if self.losses[-1] is None else self.losses[-1]
