"""Rounding at random: what bfloat16 cannot hold of a value is kept on average.

Rounded to the nearest, a change of less than half a unit in the last place is lost each time: a moment with beta
above 0.998 never decays, and a slow parameter never moves.
"""

import torch
from torch.distributed.tensor import DTensor

_PIECE = 2**16  # elements with noise at a time, so that they stay in a processor's cache
_LAUNCH = 2**30  # and at most at a time on a GPU
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
        seed: of the noise, which is the same on every device. Whoever holds a replica of ``to`` must give the same.
    """
    if to.dtype == torch.bfloat16 and wide.dtype == torch.float32:
        wide = wide.contiguous()
        flat = wide.view(-1)
        step = _PIECE if flat.device.type == "cpu" else _LAUNCH
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            bits = part.view(torch.int32)
            # All exponent bits: what is not finite stays as it is, for a NaN of many bits would overflow to a number.
            lower = ((bits & 0x7F800000) != 0x7F800000).to(torch.int32).mul_(0xFFFF)
            bits += _noise(start, part.numel(), seed, part.device) & lower
            bits &= ~lower
    to.copy_(wide)


def _noise(start: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """int32 ``[count]`` of which the lower 16 bits, as many as bfloat16 cuts off, are as good as random.

    Of the elements from ``start``, an even number: each two share a hash (MurmurHash3's finaliser) of their place.
    """
    low, high = (torch.tensor(each - 2**31).to(torch.int32).item() for each in (seed & 0xFFFFFFFF, seed >> 31))
    first = start // 2 % _LAUNCH
    bits = torch.arange(first, first + -(-count // 2), dtype=torch.int32, device=device)
    bits = (bits ^ low).mul_(-0x61C88647)
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB)):
        bits ^= bits >> shift & (1 << 32 - shift) - 1
        bits.mul_(factor).add_(high)
    bits ^= bits >> 16 & 0xFFFF
    return bits.view(torch.int16)[:count].to(torch.int32)
