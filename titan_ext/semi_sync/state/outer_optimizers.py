"""Outer optimizers: what turns an averaged pseudo-gradient into new global parameters.

They are ordinary ``torch.optim`` optimizers over the global copy; the averaged pseudo-gradient (start minus end) is
their gradient, so descending it moves towards the sites. Every site takes the step for itself and must come to the same
bits, whatever its hardware: those below are made so (``titan_ext.optim.exact``). Where one of the user's own is not, a
site that comes to others takes those of the rest each round, and its work counts all the same.

An outer optimizer is described by a frozen dataclass whose fields are its settings. Those that many share are keys of
``[semi_sync]`` itself (``SHARED_KEYS``); others are ``[semi_sync.NAME]``, where NAME is what it is registered under.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer

from titan_ext.errors import require, require_one_of
from titan_ext.optim import Yogi
from titan_ext.optim.delayed_nesterov import DelayedNesterov
from titan_ext.optim.exact import ExactAdagrad, ExactAdam, ExactSGD, FedAdagrad, FedAdam
from titan_ext.semi_sync.registry import Registry
from titan_ext.semi_sync.state.views import local_tensor, materialize_state

OUTER_OPTIMIZERS: "Registry[type[OuterOptimizer]]" = Registry("outer_optimizer")
"""Outer optimizers by the name that ``outer_optimizer`` accepts beside "average"."""

SHARED_KEYS = {
    "lr": "outer_lr",
    "momentum": "outer_momentum",
    "nesterov": "nesterov",
    "betas": "outer_betas",
    "eps": "outer_eps",
    "reading": "outer_reading",
}
"""Fields of outer optimizers that are keys of ``[semi_sync]``."""


register_outer_optimizer = OUTER_OPTIMIZERS.register
"""Decorate a frozen dataclass that is an ``OuterOptimizer``, so that ``outer_optimizer = "name"`` selects it."""


@dataclass(frozen=True, kw_only=True)
class OuterOptimizer(ABC):
    """The settings of one outer optimizer. It must be elementwise: on a sharded model it sees a rank's shard alone.

    Raises:
        ValueError: a setting is outside its range.
    """

    lr: float = 1.0
    """Learning rate."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, "lr", self.lr, "at least 0")

    @abstractmethod
    def create(self, parameters: list[torch.Tensor]) -> Optimizer:
        """The optimizer over the global copies of ``parameters``."""

    def state_copies(self) -> int:
        """State tensors of a parameter's size that it keeps."""
        probe = torch.zeros(1, 1)
        state = self.build([probe]).state[probe]
        return sum(isinstance(value, torch.Tensor) and value.shape == probe.shape for value in state.values())

    def build(self, parameters: list[torch.Tensor]) -> Optimizer:
        """The optimizer with all its state present, as if zero steps had been taken.

        A checkpoint is loaded in place and a peer is healed by copying, so every state tensor must
        exist from the start, not from the first round on.
        """
        optimizer = self.create(parameters)
        materialize_state(optimizer)
        return optimizer


@register_outer_optimizer("sgd")
@dataclass(frozen=True, kw_only=True)
class Sgd(OuterOptimizer):
    """DiLoCo (arXiv 2311.08105, algorithm 1), whose settings are the default; lr 1 and no momentum is FedAvg."""

    lr: float = 0.7
    """Learning rate."""
    momentum: float = 0.9
    """Momentum, from 0 to below 1."""
    nesterov: bool = True
    """Nesterov momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "from 0 to below 1")

    def create(self, parameters: list[torch.Tensor]) -> Optimizer:
        """SGD with the same bits on all machines."""
        return ExactSGD(parameters, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@register_outer_optimizer("delayed_nesterov")
@dataclass(frozen=True, kw_only=True)
class DelayedNesterovSettings(OuterOptimizer):
    """Delayed Nesterov (arXiv 2401.09135): each round is an arrival, and momentum is renewed once a cycle of them. For runs
    in which different sites contribute to neighbouring rounds (``sites_per_round``)."""

    lr: float = 0.7
    """Learning rate."""
    momentum: float = 0.9
    """Momentum, from 0 to below 1."""
    cycle: int = 4
    """Rounds of a cycle (the paper's N: as many as make all sites contribute)."""
    spread: float = 0.0
    """Share of the momentum that each round applies (c), from 0, the paper's choice, to 1 / cycle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum < 1, "momentum", self.momentum, "from 0 to below 1")
        require(self.cycle >= 1, "cycle", self.cycle, "at least 1")
        require(0 <= self.spread * self.cycle <= 1, "spread", self.spread, "from 0 to 1 / cycle")

    def create(self, parameters: list[torch.Tensor]) -> Optimizer:
        """With the same bits on all machines."""
        return DelayedNesterov(parameters, lr=self.lr, momentum=self.momentum, cycle=self.cycle, spread=self.spread)


@dataclass(frozen=True, kw_only=True)
class _Adaptive(OuterOptimizer):
    # An adaptive step is about lr an element, whatever the size of the pseudo-gradient: 0.01 is the setting of Photon's
    # server for FedYogi and within what arXiv 2003.00295 found best for language.
    lr: float = 0.01
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the two moments (arXiv 2003.00295), each from 0 to below 1."""
    eps: float = 1e-3
    """Adaptivity floor (arXiv 2003.00295), above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(fits, "betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "above 0")


@dataclass(frozen=True, kw_only=True)
class _TwoReadings(_Adaptive):
    reading: Literal["paper", "torch"] = "paper"
    """As arXiv 2003.00295 prints it, or as torch has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("reading", self.reading, ("paper", "torch"))


@register_outer_optimizer("adam")
@dataclass(frozen=True, kw_only=True)
class Adam(_TwoReadings):
    """FedAdam (arXiv 2003.00295, algorithm 2), or with torch's reading bias-corrected as in Photon's server."""

    def create(self, parameters: list[torch.Tensor]) -> Optimizer:
        """Adam with the same bits on all machines."""
        kind = FedAdam if self.reading == "paper" else ExactAdam
        return kind(parameters, lr=self.lr, betas=self.betas, eps=self.eps)


@register_outer_optimizer("yogi")
@dataclass(frozen=True, kw_only=True)
class FedYogi(_Adaptive):
    """FedYogi (arXiv 2003.00295, algorithm 2)."""

    def create(self, parameters: list[torch.Tensor]) -> Optimizer:
        """Yogi with the same bits on all machines."""
        return Yogi(parameters, lr=self.lr, betas=self.betas, eps=self.eps)


@register_outer_optimizer("adagrad")
@dataclass(frozen=True, kw_only=True)
class Adagrad(_TwoReadings):
    """FedAdagrad (arXiv 2003.00295, algorithm 2), or with torch's reading without momentum and from zero."""

    def create(self, parameters: list[torch.Tensor]) -> Optimizer:
        """Adagrad with the same bits on all machines."""
        kind = FedAdagrad if self.reading == "paper" else ExactAdagrad
        return kind(parameters, lr=self.lr, betas=self.betas, eps=self.eps)


def work_on(optimizer: Optimizer, parameters: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
    """Make an optimizer over a model's parameters work on the global copies in their stead.

    Its groups, hyper-parameters and schedulers stay; state it has already moves along.
    """
    copy_of = {id(parameter): copy for parameter, copy in zip(parameters, copies, strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [copy_of.get(id(each), each) for each in group["params"]]
    for parameter in parameters:
        if parameter in optimizer.state:
            moved = optimizer.state.pop(parameter)
            optimizer.state[copy_of[id(parameter)]] = {
                key: local_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in moved.items()
            }
