"""Outer optimizers: what turns an averaged pseudo-gradient into new global parameters.

They are ordinary ``torch.optim`` optimizers over the global copy; the averaged pseudo-gradient
(start minus end) is their gradient, so descending it moves towards the sites. Whether they go tensor
by tensor or all at once (``foreach``) is torch's choice: on a CPU the latter only takes memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from titan_ext.optim import Yogi
from titan_ext.semi_sync.state.views import local_tensor, materialize_state


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterSettings:
    """Hyper-parameters handed to an outer optimizer's factory."""

    lr: float
    momentum: float
    nesterov: bool
    betas: tuple[float, float]
    eps: float


OuterFactory = Callable[[list[torch.Tensor], OuterSettings], Optimizer]


def _sgd(parameters: list[torch.Tensor], settings: OuterSettings) -> Optimizer:
    """DiLoCo (arXiv 2311.08105, algorithm 1); lr 1 and no momentum is FedAvg."""
    return torch.optim.SGD(
        parameters,
        lr=settings.lr,
        momentum=settings.momentum,
        # torch refuses Nesterov without momentum, where the two coincide.
        nesterov=settings.nesterov and settings.momentum > 0,
    )


def _adam(parameters: list[torch.Tensor], settings: OuterSettings) -> Optimizer:
    """FedAdam (arXiv 2003.00295, algorithm 2), bias-corrected as in Photon's server."""
    return torch.optim.Adam(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def _adagrad(parameters: list[torch.Tensor], settings: OuterSettings) -> Optimizer:
    """FedAdagrad (arXiv 2003.00295, algorithm 2)."""
    return torch.optim.Adagrad(parameters, lr=settings.lr, eps=settings.eps)


def _yogi(parameters: list[torch.Tensor], settings: OuterSettings) -> Optimizer:
    """FedYogi (arXiv 2003.00295, algorithm 2)."""
    return Yogi(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps)


_FACTORIES: dict[str, OuterFactory] = {"sgd": _sgd, "adam": _adam, "adagrad": _adagrad, "yogi": _yogi}


def register_outer_optimizer(name: str, factory: OuterFactory) -> None:
    """Make ``outer_optimizer = name`` build ``factory(parameters, settings)``.

    The optimizer must be elementwise: on a sharded model it sees each rank's shard alone.

    Raises:
        ValueError: the name is taken.
    """
    if name in _FACTORIES or name == "average":
        raise ValueError(f"outer optimizer {name!r} is already registered")
    _FACTORIES[name] = factory


def outer_optimizer_names() -> list[str]:
    """Names that ``outer_optimizer`` accepts."""
    return ["average", *sorted(_FACTORIES)]


def build_outer_optimizer(name: str, parameters: list[torch.Tensor], settings: OuterSettings) -> Optimizer:
    """Build the outer optimizer with all its state present, as if zero steps had been taken.

    A checkpoint is loaded in place and a peer is healed by copying, so every state tensor must
    exist from the start, not from the first round on.
    """
    optimizer = _FACTORIES[name](parameters, settings)
    materialize_state(optimizer)
    return optimizer


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
