"""What is compared: the momenta of each arm, how its sites meet; what a run is given and returns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, log
from typing import Any

FAST = 0.9
"""Decay of Adam's momentum, also while all arms warm up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a comparison share."""

    steps: int
    """Inner steps after the warm-up; a multiple of 20 syncs."""
    warmup: int
    """Steps of data parallelism with Adam that all arms begin with, but those from scratch."""
    warmup_lr: float
    """Learning rate of the warm-up, which rises over its first half."""
    sites: int
    batch: int
    """Windows of text that a site trains on in a step, each of which tells one character."""
    dim: int
    """Width of the model."""
    beta2: float
    """Decay of the second moment."""
    decay: float
    """Share of the steps in which the learning rate falls to 0, with 1 - sqrt; 0 leaves it constant, as the author did."""
    corpus: str
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """Settings of ``LowRankAdamW``."""

    rank: int
    beta: float
    """Decay of the low-rank momentum."""
    omega: float
    """Its weight; the full-rank gradient has the rest."""
    error_feedback: bool = True
    first_basis: str = "gradient"
    """Of the outer loop's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One line of a comparison."""

    label: str
    betas: tuple[float, ...] = (FAST,)
    """Decay of each momentum."""
    omegas: tuple[float, ...] = (1.0,)
    """Weight of each; the gradient has the rest."""
    sync_every: int | None = None
    """K; None is data parallelism."""
    from_scratch: bool = False
    """Without the warm-up and the switch: these momenta, and sites of their own, from the first step."""
    method: str = "mt_dao"
    """Of the outer loop. With ``mt_dao`` and one momentum of weight 1 it is Local Adam."""
    outer: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the outer loop's configuration."""
    low_rank: LowRank | None = None
    """The optimizer instead of one with these momenta, with states from zero after the warm-up."""
    inner: str = ""
    """Name in ``titan_ext.optim`` of the optimizer instead of those, with states from zero after the warm-up."""
    own: str = "ddp"
    """The arm of data parallelism that trains with the same optimizer."""

    @property
    def switches(self) -> bool:
        """Whether momenta change, and begin anew, after the warm-up."""
        return not self.from_scratch and (self.betas, self.omegas) != ((FAST,), (1.0,))

    def describe(self) -> dict[str, Any]:
        """All that a run of it depends on."""
        other: dict[str, Any] = {}
        if self.method != "mt_dao":
            other["method"] = self.method
        if self.low_rank is not None:
            other["low_rank"] = asdict(self.low_rank)
        if self.outer:
            other["outer"] = dict(self.outer)
        if self.inner:
            other["inner"] = self.inner
        return other | {
            "betas": self.betas,
            "omegas": self.omegas,
            "sync_every": self.sync_every,
            "from_scratch": self.from_scratch,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to."""

    steps: list[int]
    """Steps after the warm-up at which it was measured, when all sites hold the same."""
    losses: list[float | None]
    """Validation loss there, in nats a character; None where it is no number."""
    bytes_sent: int
    """By a site, after the warm-up."""
    parameters: int
    tokens_sha256: str
    """Hash of all windows after the warm-up, in order."""
    seconds: float
    """Its share of the time of the runs that were trained with it."""

    @property
    def loss(self) -> float:
        """The last validation loss; infinite for a run that diverged."""
        return inf if self.losses[-1] is None else self.losses[-1]


MEASUREMENTS = 20
"""Over a run."""


def half_life(beta: float) -> float:
    """Steps after which a momentum holds half of what it held."""
    return log(0.5) / log(beta)


def ddp() -> Arm:
    """Data parallelism with Adam."""
    return Arm(label="DDP, Adam")


def local_adam(every: int) -> Arm:
    """Adam at each site, all states averaged."""
    return Arm(label=f"Local Adam, K {every}", sync_every=every)


def single(beta: float, omega: float, every: int | None, own: str, from_scratch: bool = False) -> Arm:
    """One slow momentum beside the gradient: the quasi-hyperbolic form."""
    label = f"gradient {1 - omega:.2g} + {omega:g} of beta {beta:g}{', from scratch' if from_scratch else ''}"
    return Arm(
        label=f"{_where(every)}: {label}",
        betas=(beta,),
        omegas=(omega,),
        sync_every=every,
        from_scratch=from_scratch,
        own=own,
    )


def double(beta: float, omega: float, every: int | None, own: str) -> Arm:
    """A fast and a slow momentum, as in the author's runs of November 2025."""
    label = f"beta {FAST:g} {1 - omega:.2g} + {omega:g} of beta {beta:g}"
    omegas = (round(1 - omega, 6), omega)
    return Arm(label=f"{_where(every)}: {label}", betas=(FAST, beta), omegas=omegas, sync_every=every, own=own)


def _where(every: int | None) -> str:
    return "DDP" if every is None else f"MT-DAO, K {every}"
