"""Sketches: short vectors of tensors, whose inner products and distances are on average those of the tensors.

Each element goes, with a random sign, into one of a sketch's sums (a count sketch, Charikar, Chen and Farach-Colton 2002; a
random projection that costs one addition for each element). Sign and sum follow from the element's place in the whole
tensor, so a sketch does not depend on how a site cuts tensors, and sketches add up as the tensors do.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence

import torch

from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.site.shards import Piece, counted_once, piece_of
from titan_ext.semi_sync.state.tensors import BoundTensors

_PIECE = 2**18  # elements worked on at a time
_MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)


class Sketches:
    """Makes one sketch for each unit of the parameters. Building it is a collective over the site.

    Args:
        tensors: the parameters as far as this rank holds them.
        site: the ranks that hold the whole of them.
        unit_of: from a parameter's name to its unit's, such as a block of the model.
        size: numbers of a sketch.
    """

    def __init__(self, tensors: BoundTensors, site: SiteRanks, unit_of: Callable[[str], str], size: int) -> None:
        self._site, self._size = site, size
        self.units = sorted(
            {unit for units in site.gather({unit_of(name) for name in tensors.names}) for unit in units}
        )
        """Names of the units, of the whole site."""
        self.places = [self.units.index(unit_of(name)) for name in tensors.names]
        """Of each parameter on this rank the place of its unit among ``units``."""
        counts = counted_once(tensors.names, tensors.view.tensor, site)
        self._pieces = [
            piece_of(tensors.view.tensor(name)) if counted else None
            for name, counted in zip(tensors.names, counts, strict=True)
        ]
        self._seeds = [zlib.crc32(name.encode()) for name in tensors.names]

    @property
    def numbers(self) -> int:
        """Of all units together."""
        return len(self.units) * self._size

    @torch.no_grad()
    def of(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """float64 ``[units, size]`` in host memory, equal on all ranks of the site. A collective over them.

        Args:
            parts: values of this rank's parameters, in their shapes.
        """
        sums = torch.zeros(len(self.units), self._size, dtype=torch.float64)
        for part, piece, seed, place in zip(parts, self._pieces, self._seeds, self.places, strict=True):
            if piece is not None:
                sums[place] += sketch(part, piece, seed, self._size).cpu()
        return self._site.sum(sums)


def sketch(part: torch.Tensor, piece: Piece, seed: int, size: int) -> torch.Tensor:
    """What a part of a tensor adds to the sketch of the whole: float64 ``[size]``.

    Args:
        part: in the shape of ``piece``.
        piece: where the part lies in the whole.
        seed: below 2**32; another one for each tensor of a unit.
        size: numbers of the sketch.
    """
    total = torch.zeros(size, dtype=torch.float64, device=part.device)
    start, flat = 0, part.detach().reshape(-1)
    for places in _places(piece, part.device):
        mixed = _mix(places, seed)
        values = flat[start : start + len(places)].double()
        start += len(places)
        signed = torch.where((mixed & 1).bool(), values, -values)
        total += torch.bincount((mixed >> 1) % size, weights=signed, minlength=size)
    return total


def _places(piece: Piece, device: torch.device) -> Iterator[torch.Tensor]:
    """Places of the part's elements in the flat whole tensor, int64, some rows of its first dimension at a time."""
    indices = [
        torch.cat([torch.arange(*run, device=device) for run in runs] or [torch.empty(0)]) for runs in piece.runs
    ]
    if not piece.numel:
        return
    stride, inner = 1, torch.zeros(1, dtype=torch.int64, device=device)
    for size, index in zip(reversed(piece.shape[1:]), reversed(indices[1:]), strict=True):
        inner = (index[:, None] * stride + inner).reshape(-1)
        stride *= size
    rows = indices[0] if indices else torch.zeros(1, dtype=torch.int64, device=device)
    for some in rows.split(max(1, _PIECE // len(inner))):
        for columns in inner.split(_PIECE):
            yield (some[:, None] * stride + columns).reshape(-1)


def _mix(places: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers from 0 to below 2**62 that look random, by integer arithmetic modulo 2**64 alone."""
    mixed = places * _MIX[0] + (seed * _MIX[1] & (2**62 - 1))
    mixed = (mixed ^ _shifted(mixed, 30)) * _MIX[1]
    mixed = (mixed ^ _shifted(mixed, 27)) * _MIX[0]
    return _shifted(mixed ^ _shifted(mixed, 31), 2)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as numbers without a sign: torch has no such integers with arithmetic."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
