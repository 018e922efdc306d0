"""What the optimizers that work on local shards have in common: shards and complaints."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from titan_ext.errors import InvalidValue


def require(group: dict[str, Any], key: str, fine: bool, allowed: str) -> None:
    """Raise ``InvalidValue`` for a group's ``key``, with what is ``allowed``, unless it is ``fine``."""
    if not fine:
        raise InvalidValue(key, group[key], f"must be {allowed}")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard; the tensor itself if it is not a DTensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of the gradient, cut as the parameter is."""
    gradient = parameter.grad
    # Under sequence parallelism a replicated parameter's gradient is a sum still to be done.
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)
