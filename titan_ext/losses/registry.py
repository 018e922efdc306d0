"""The losses by name."""

from collections.abc import Callable
from typing import TypeVar

from titan_ext.losses.token_loss import TokenLoss
from titan_ext.semi_sync.registry import Registry

Loss = TypeVar("Loss", bound=type[TokenLoss])

PLAIN = "cross_entropy"
"""The name of torchtitan's own loss."""

LOSSES: Registry[type[TokenLoss]] = Registry("loss.name")


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Decorate a ``TokenLoss``: ``[loss] name`` selects it, and the fields of its ``Config`` are keys of ``[loss.NAME]``.

    Raises:
        ValueError: the name is taken.
    """

    def add(loss: Loss) -> Loss:
        if name == PLAIN:
            raise ValueError(f"{LOSSES.key} {name!r} is already registered")
        if loss.Config._owner is not loss:
            raise ValueError(f"{LOSSES.key} {name!r}: {loss.__qualname__} needs a nested Config of its own")
        LOSSES.add(name, loss)
        return loss

    return add
