"""What the optimizers that work on local shards have in common: their shards."""

import torch
from torch.distributed.tensor import DTensor


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
