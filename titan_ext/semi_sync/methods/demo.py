"""DeMo (arXiv 2411.19870): every step the sites exchange the strongest DCT coefficients of their momenta.

The rest stays in the momentum for later steps. The parameters take the sign of what the mean of the
sent coefficients stands for, so all sites hold the same ones. Tensors are cut into tiles of at most
``compression_chunk`` in each dimension (the largest divisors); sharded ones shard by shard. A coefficient's
mean is over the sites that sent it. A joining site takes a member's parameters, with no momentum.
The authors' decoding may differ between devices, and so their parameters. Here means are formed site by site, in one
order, and what they stand for is computed in whole numbers, so that its sign is the same on every machine.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from titan_ext.optim.cosine import inverse_in_whole_numbers, whole_basis
from titan_ext.optim.rounding import copy_randomly, seed_of
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import PARAMETERS, Apply, SyncRule
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.wire.codecs import Codec, pack_12_bits, unpack_12_bits
from titan_ext.semi_sync.wire.coded_reductions import CodedReduction

_PIECE = 2**20  # elements whose sign is computed at a time


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """``[semi_sync.demo]``.

    Raises:
        ValueError: a number is outside its range.
    """

    compression_chunk: int = 64
    """Largest side of a tile, from 1 to 64."""

    compression_topk: int = 32
    """Coefficients of a tile that travel, at least 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.compression_chunk <= 64:
            raise ValueError(f"compression_chunk = {self.compression_chunk}: must be from 1 to 64")
        if self.compression_topk < 1:
            raise ValueError(f"compression_topk = {self.compression_topk}: must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SignStep(Apply):
    """A step of the learning rate against the sign of what the mean coefficients stand for."""

    chunk: int
    topk: int

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The momenta, whose exchange moves the parameters."""
        return SignedMomentum(rule, tensors, options)


def cosine_basis(size: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix ``[size, size]``: its product with a vector are the coefficients."""
    place = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * place + 1) * place[:, None] / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float()


def tile_sides(shape: torch.Size, largest: int) -> tuple[int, int]:
    """Rows and columns of a tile of a tensor seen as a matrix: the largest divisors that are small enough."""
    rows, columns = _as_matrix(shape)
    rows, columns = (max(side for side in range(1, largest + 1) if size % side == 0) for size in (rows, columns))
    return rows, columns


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())


@dataclass(frozen=True)
class StrongestCoefficients(Codec):
    """The largest values of every tile in fp32, with their places in 12 bits each."""

    shapes: tuple[tuple[int, int], ...]
    """Count and elements of the tiles, in the order of the values."""
    kept: int
    """Values that travel of each tile, if it has as many."""

    sparse = True

    @cached_property
    def _tiles(self) -> list[tuple[int, int, int]]:
        return [(count, size, min(self.kept, size)) for count, size in self.shapes if count * size]

    @cached_property
    def _sent(self) -> int:
        return sum(count * kept for count, _, kept in self._tiles)

    @property
    def granularity(self) -> int:
        """All of them: a message is of all tiles."""
        return max(1, sum(count * size for count, size in self.shapes))

    @property
    def _filling(self) -> int:
        return -self._sent % 8  # so that a message is of whole words

    def wire_bytes(self, numel: int) -> int:
        return 4 * self._sent + 3 * (self._sent + self._filling) // 2

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> None:
        strongest, places = [], []
        for tiles, kept in self._split(values):
            found = tiles.abs().topk(kept, dim=1, sorted=False).indices
            strongest.append(tiles.gather(1, found).view(-1))
            places.append(found.view(-1))
        if self._sent:
            places.append(places[-1].new_zeros(self._filling))
            message[: 4 * self._sent].view(torch.float32).copy_(torch.cat(strongest))
            message[4 * self._sent :].copy_(pack_12_bits(torch.cat(places)))

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        values.zero_()
        self.accumulate(message, values)

    def accumulate(self, message: torch.Tensor, values: torch.Tensor) -> None:
        for tiles, places, strongest in self._sent_in(message, values):
            tiles.scatter_add_(1, places, strongest)

    def combine(self, messages: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """The mean of each coefficient over those who sent it."""
        values.zero_()
        senders = torch.zeros_like(values)
        for message in messages:
            self.accumulate(message, values)
            for tiles, places, strongest in self._sent_in(message, senders):
                # A site that only joins sends zeros.
                tiles.scatter_add_(1, places, (strongest != 0).float())
        values.div_(senders.clamp_(min=1))

    def _split(self, values: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        parts = values.split([count * size for count, size, _ in self._tiles]) if self._tiles else ()
        return [(part.view(count, size), kept) for part, (count, size, kept) in zip(parts, self._tiles, strict=True)]

    def _sent_in(
        self, message: torch.Tensor, values: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        strongest = message[: 4 * self._sent].view(torch.float32)
        places = unpack_12_bits(message[4 * self._sent :])
        found, start = [], 0
        for tiles, kept in self._split(values):
            end = start + len(tiles) * kept
            found.append((tiles, places[start:end].view(-1, kept), strongest[start:end].view(-1, kept)))
            start = end
        return found


class SignedMomentum(SyncedState):
    """Sends the momentum's coefficients, tile after tile; the sign of what comes back moves the parameters."""

    facts = StateFacts(elementwise=False, averages=False)
    takes_residual = True

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        apply, shapes = rule.apply, tensors.shapes
        assert isinstance(apply, SignStep)
        self._sides = [tile_sides(shape, apply.chunk) if shape.numel() else (1, 1) for shape in shapes]
        used = {side for sides in self._sides for side in sides}
        self._bases = {side: cosine_basis(side).to(tensors.device) for side in used}
        self._whole_bases = {side: whole_basis(side).to(tensors.device) for side in used}
        areas = [math.prod(sides) for sides in self._sides]
        tiles = tuple((shape.numel() // area, area) for shape, area in zip(shapes, areas, strict=True))
        self.reduction = CodedReduction(StrongestCoefficients(tiles, apply.topk), max(1, self.elements))

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The coefficients."""
        for part, momentum, sides in zip(self.tensors.split(out), self.tensors.locals(), self._sides, strict=True):
            part.view(-1).copy_(self._transform(momentum.to(out), sides))

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Weight decay, and a step of each parameter's learning rate against the sign."""
        parameters = self.tensors.view.tensors(PARAMETERS, self.names)
        rates, decays = (self.tensors.view.tensors(key, self.names) for key in ("rate", "decay"))
        everything = zip(self.tensors.split(total), parameters, rates, decays, self._sides, strict=True)
        for place, (part, parameter, rate, decay, sides) in enumerate(everything):
            rows, columns = _as_matrix(parameter.shape)
            high, wide = sides
            tiles = part.reshape(rows // high, columns // wide, high, wide)
            some = max(1, _PIECE // max(1, high * columns))
            targets = parameter.view(rows, columns).split(some * high)
            for number, (signs, target) in enumerate(zip(self._signs(tiles, some), targets, strict=True)):
                moved = target.to(signs.dtype).mul_(decay.to(signs)).sub_(signs.mul_(rate.to(signs)))
                if moved.dtype != target.dtype:
                    copy_randomly(target, moved, seed_of(self.seed(of.step, place), number))

    @torch.no_grad()
    def take_residual(self, residual: torch.Tensor) -> None:
        """What was not sent is what remains of the momentum."""
        for part, momentum, sides in zip(self.tensors.split(residual), self.tensors.locals(), self._sides, strict=True):
            momentum.copy_(self._inverse(part, sides))

    def shared_state(self) -> NamedState:
        """The parameters: all sites hold the same."""
        return {name: {"value": value} for name, value in zip(self.names, self.global_values(), strict=True)}

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A member's parameters, without momentum."""
        self.load(self.shared_state(), state)
        if self.elements:
            torch._foreach_zero_(self.tensors.locals())

    def checkpoint_state(self) -> NamedState:
        """Nothing: the model's and the optimizer's own checkpoints hold all there is."""
        return {}

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing to restore."""

    def global_values(self) -> list[torch.Tensor]:
        """The parameters themselves."""
        return self.tensors.view.tensors(PARAMETERS, self.names)

    def _signs(self, tiles: torch.Tensor, some: int) -> Iterator[torch.Tensor]:
        """Signs of what coefficients ``[tiles high, tiles wide, high, wide]`` stand for, some rows of tiles at a time."""
        high, wide = tiles.shape[-2:]
        rows, columns = self._whole_bases[high], self._whole_bases[wide]
        for part in tiles.split(some):
            values = inverse_in_whole_numbers(part, rows, columns).sign_().float()
            yield values.transpose(1, 2).reshape(len(part) * high, -1)

    def _transform(self, value: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
        """Coefficients of a tensor, tile after tile, flat."""
        rows, columns = _as_matrix(value.shape)
        high, wide = sides
        tiles = value.reshape(rows // high, high, columns // wide, wide).transpose(1, 2)
        return (self._bases[high] @ tiles @ self._bases[wide].mT).reshape(-1)

    def _inverse(self, coefficients: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
        """The tensor that coefficients (in its shape, but tile after tile) stand for."""
        rows, columns = _as_matrix(coefficients.shape)
        high, wide = sides
        tiles = coefficients.reshape(rows // high, columns // wide, high, wide)
        return (self._bases[high].mT @ tiles @ self._bases[wide]).transpose(1, 2).reshape(coefficients.shape)


@register_method(
    "demo",
    settings=DemoSettings,
    fixed={
        "outer_optimizer": "average",
        "codec": "fp32",
        "weighting": "uniform",
        "sync_every": 1,
        "aggregation": "mean",
    },
    sync_every=1,
    outer_optimizer="average",
)
def demo(context: MethodContext) -> list[SyncRule]:
    """One rule of momentum for each fragment, every step."""
    step = SignStep(chunk=context.settings.compression_chunk, topk=context.settings.compression_topk)
    return [
        SyncRule(state="momentum", fragment=fragment, period=1, retry=False, wire=context.wire, apply=step)
        for fragment in range(context.num_fragments)
    ]
