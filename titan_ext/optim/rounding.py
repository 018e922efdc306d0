"""Rounding at random: what bfloat16 cannot hold of a value is kept on average.

Rounded to the nearest, a change of less than half a unit in the last place is lost each time: a moment with beta
above 0.998 never decays, and a slow parameter never moves.
"""

import torch
from torch.distributed.tensor import DTensor

_PIECE = 2**18  # elements with noise at a time, so that they stay in a processor's cache
_MASK = 2**64 - 1


def seed_of(*numbers: int) -> int:
    """A seed for these numbers, in their order: that of another list is as good as independent (SplitMix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ state >> shift) * factor & _MASK
        state ^= state >> 31
    return state >> 1


def shard_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Which shard of a DTensor this rank holds: equal at ranks that hold the same one. Empty for a whole tensor."""
    if not isinstance(tensor, DTensor):
        return ()
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return tuple(place for place, placement in places if getattr(placement, "dim", None) is not None)


@torch.no_grad()
def copy_randomly(to: torch.Tensor, wide: torch.Tensor, seed: int) -> None:
    """Write ``wide`` to ``to`` (local tensors of one shape): up or down, right on average, if that is bfloat16.

    Args:
        to: of any dtype; one other than bfloat16 is rounded as ``copy_`` does.
        wide: fp32, on the same device; overwritten where ``to`` is bfloat16.
        seed: of the noise. Whoever holds a replica of ``to`` must give the same.
    """
    if to.dtype == torch.bfloat16 and wide.dtype == torch.float32:
        generator = torch.Generator(wide.device).manual_seed(seed)
        flat = wide.view(-1)
        for part in flat.split(_PIECE if flat.device.type == "cpu" else max(1, flat.numel())):
            # Of 64 random bits each number takes 16, as many as bfloat16 cuts off.
            drawn = torch.empty(-(-part.numel() // 4), dtype=torch.int64, device=part.device)
            noise = drawn.random_(-(2**63), None, generator=generator).view(torch.int16)[: part.numel()]
            lower = part.isfinite().to(torch.int32) * 0xFFFF  # a NaN of many bits would overflow to a number
            bits = part.view(torch.int32)
            bits += noise.to(torch.int32) & lower
            bits &= ~lower
    to.copy_(wide)
