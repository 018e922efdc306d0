"""What is compared: how a contribution is pruned, and by how much."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

DENSE, PLAIN, POWER = "dense", "topk", "sparsyfed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs share."""

    dim: int
    layers: int
    steps: int
    """Inner steps; a multiple of ``sync_every``."""
    sites: int
    batch: int
    length: int
    sync_every: int
    exponent: float
    """Power of SparsyFed's layers."""
    corpus: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to."""

    loss_whole: float | None
    """Of the shared model after the last round, on text that no site trains on; None where it is no number."""
    bytes_sent: int
    """By a site in all rounds, by the outer loop's ledger."""
    bytes_last_round: int
    density: float
    """Share of the pruned matrices' weights that the shared model has after the last round: the union of all sites'."""
    regrown: float
    """Mean over the rounds after the first: share of weights that a site sends though it had received none there."""
    tokens_sha256: str
    seconds: float

    @property
    def loss(self) -> float:
        """Infinite for a run that diverged."""
        return inf if self.loss_whole is None else self.loss_whole


def arm_names(sparsities: Sequence[float]) -> list[str]:
    """Dense, then each way of pruning at each sparsity."""
    return [DENSE, *(f"{kind}_{sparsity:g}" for kind in (PLAIN, POWER) for sparsity in sparsities)]


def kind_and_sparsity(arm: str) -> tuple[str, float]:
    """What an arm prunes by, and how much."""
    kind, _, sparsity = arm.partition("_")
    return kind, float(sparsity or 0)
