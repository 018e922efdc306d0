"""The methods that are compared: the inner optimizer and the outer loop of each; what a run is given and returns.

All optimizers have the same decay of the second moment, no weight decay, and gradients clipped at a norm of 1
(a site's own, or the mean's under data parallelism), as in DES-LOC's runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

_BETA1, _BETA2 = 0.9, 0.99
# Steps of the author's runs of MT-DAO, and the decay of their slow momentum.
_AUTHORS_STEPS, _AUTHORS_BETA = 40960, 0.999
# Data parallelism renews its bases at every step, as LDAdam does; LoRDO must wait for a sync.
_EVERY_STEP = 1
_LORDO_OMEGA = 0.97


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
        return inf if self.losses[-1] is None else self.losses[-1]


Optimizer = tuple[str, dict[str, Any]]
"""Name in ``torch.optim`` or ``titan_ext.optim``, and hyper-parameters without the learning rate."""


def _adam(settings: Settings) -> Optimizer:
    return "AdamW", {"betas": (_BETA1, _BETA2), "weight_decay": 0.0, "fused": True}


def _slow_adam(settings: Settings) -> Optimizer:
    return "QHAdamW", {"betas": (settings.slow_beta, _BETA2), "omegas": (settings.omega,)}


def _low_rank_adam(settings: Settings) -> Optimizer:
    return "LowRankAdamW", {
        "rank": settings.rank,
        "betas": (_BETA1, _BETA2),
        "adamw_betas": (_BETA1, _BETA2),
        "omega": 1.0,
        "basis_from": "gradient",
        "refresh_every": _EVERY_STEP,
    }


def _slow_low_rank_adam(settings: Settings) -> Optimizer:
    slow = {"betas": (settings.slow_beta, _BETA2), "omega": _LORDO_OMEGA, "basis_from": "outer"}
    name, rest = _low_rank_adam(settings)
    return name, rest | slow


def slow_beta(steps: int) -> float:
    """Decay of the slow momentum whose half-life is the same share of ``steps`` as in the author's runs of MT-DAO."""
    return round(_AUTHORS_BETA ** (_AUTHORS_STEPS / steps), 5)


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the comparison."""

    label: str
    inner: Callable[[Settings], Optimizer]
    outer: Mapping[str, Any] | None = None
    """Fields of ``SemiSync.Config`` besides ``sync_every``; None is data parallelism: gradients averaged each step."""
    lr_scale: float = 1.0
    """Where its learning rates are looked for, relative to Adam's, as its authors train it."""

    standard: bool = True
    """Whether it is compared unless the user names methods."""

    def describe(self, settings: Settings) -> list[Any]:
        """All that the method makes of the settings, as JSON values."""
        return [*self.inner(settings), dict(self.outer) if self.outer is not None else None]


METHODS = {
    "ddp": Method("DDP-Adam", _adam),
    "ddp_slow": Method("DDP, MT-DAO's optimizer", _slow_adam, lr_scale=2.0, standard=False),
    "local_adam": Method("Local Adam", _adam, {"method": "local_adam"}),
    "des_loc": Method("DES-LOC, 3x and 6x", _adam, {"method": "des_loc"}),
    "mt_dao": Method("MT-DAO", _slow_adam, {"method": "mt_dao"}, lr_scale=2.0),
    "diloco": Method("DiLoCo", _adam, {"method": "diloco"}),
    "fedavg": Method("FedAvg, local states", _adam, {"method": "local_sgd"}),
    "low_rank_ddp": Method("low-rank DDP", _low_rank_adam, lr_scale=4.0),
    "lordo": Method("LoRDO", _slow_low_rank_adam, {"method": "lordo"}, lr_scale=4.0),
}
