"""The discrete cosine transform in whole numbers, whose results are the same on every machine, in whatever order it sums."""

from decimal import Decimal, localcontext
from functools import cache

import torch

_BASIS_BITS, _VALUE_BITS = 22, 27
"""Binary digits of the factors. A row of the basis sums to at most the root of 64, so sums stay below 2**53: exact."""

_PI = Decimal("3.14159265358979323846264338327950288419716939937510")
_DIGITS, _TERMS = 45, 25


def whole_basis(size: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix ``[size, size]`` (``size`` at most 64) times 2**22, rounded: whole numbers in float64."""
    rows = [[_entry(frequency, place, size) for place in range(size)] for frequency in range(size)]
    return torch.tensor(rows, dtype=torch.float64)


def inverse_in_whole_numbers(tiles: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What coefficients stand for, but for a positive factor in each tile: whole numbers, float64.

    The sign is that of the transform in exact arithmetic wherever its size is above about 2**-20 of the tile's norm, and
    equal on all machines everywhere.

    Args:
        tiles: coefficients, fp32 ``[…, high, wide]``.
        rows, columns: ``whole_basis(high)`` and ``whole_basis(wide)``.
    """
    largest = tiles.abs().amax(dim=(-2, -1), keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    whole = (tiles / largest).double().mul_(2.0**_VALUE_BITS).round_()
    # At most 2**27 * 2**22 * 8; back to 27 bits before the next product.
    half = (rows.mT @ whole).mul_(2.0 ** -(_BASIS_BITS + 3)).round_()
    return half @ columns


def _entry(frequency: int, place: int, size: int) -> float:
    with localcontext() as context:
        context.prec = _DIGITS
        scale = (Decimal(1 if frequency == 0 else 2) / size).sqrt()
        turned = (2 * place + 1) * frequency % (4 * size)  # quarters of a turn, in parts of ``size``
        turned = min(turned, 4 * size - turned)
        cosine = _cosine(turned, size) if turned <= size else -_cosine(2 * size - turned, size)
        return float((scale * cosine * 2**_BASIS_BITS).to_integral_value())


@cache
def _cosine(part: int, size: int) -> Decimal:
    """The cosine of ``part`` / ``size`` of a right angle, by its series."""
    with localcontext() as context:
        context.prec = _DIGITS
        angle = _PI * part / (2 * size)
        term = total = Decimal(1)
        for n in range(1, _TERMS):
            term = -term * angle * angle / ((2 * n - 1) * (2 * n))
            total += term
        return total
