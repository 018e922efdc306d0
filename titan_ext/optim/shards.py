"""What the optimizers that work on local shards have in common: shards, rounding, and complaints."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

_NOISE = 2**13


def require(group: dict[str, Any], key: str, fine: bool, allowed: str) -> None:
    """Raise a ValueError that names a group's ``key``, its value and what is ``allowed``, unless it is ``fine``."""
    if not fine:
        raise ValueError(f"{key} = {group[key]}: must be {allowed}")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard; the tensor itself if it is not a DTensor."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of the gradient, cut as the parameter is."""
    gradient = parameter.grad
    # Under sequence parallelism a replicated parameter's gradient is a sum still to be done.
    if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def store(stored: list[torch.Tensor], worked: list[torch.Tensor], seed: int) -> None:
    """Copy what was worked on in another dtype to where it is kept."""
    pairs = [(to, wide) for to, wide in zip(stored, worked, strict=True) if to is not wide]
    if pairs:
        halved = [wide for to, wide in pairs if to.dtype == torch.bfloat16 and wide.dtype == torch.float32]
        _round_randomly(halved, seed)
        torch._foreach_copy_([to for to, _ in pairs], [wide for _, wide in pairs])


def _round_randomly(tensors: list[torch.Tensor], seed: int) -> None:
    """Round float32 tensors, in place, to numbers that bfloat16 has: up or down, right on average.

    The noise depends on the step and the place in the local shard only: replicas of a tensor must stay equal.
    """
    if not tensors:
        return
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    noise = torch.randint(0, 2**16, (_NOISE,), generator=generator, dtype=torch.int32, device=generator.device)
    for tensor in tensors:
        bits = tensor.view(torch.int32)
        bits += noise.repeat(-(-bits.numel() // _NOISE))[: bits.numel()].view(bits.shape)
        bits &= -(2**16)
