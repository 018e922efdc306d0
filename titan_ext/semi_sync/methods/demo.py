"""DeMo (arXiv 2411.19870): every step the sites exchange the strongest DCT coefficients of their momenta.

The rest stays in the momentum for later steps. The parameters take the sign of what the mean of the
sent coefficients stands for, so all sites hold the same ones. Tensors are cut into tiles of at most
``demo_chunk`` in each dimension (the largest divisors); sharded ones shard by shard. A coefficient's
mean is over the sites that sent it. A joining site takes a member's parameters, with no momentum.
The authors' decoding may differ between devices; here it goes site by site, in one order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.plan.plan import PARAMETERS, SyncPlan, SyncRow
from titan_ext.semi_sync.state.synced_state import Landing, SyncedRow
from titan_ext.semi_sync.wire.codecs import Codec, pack_12_bits, unpack_12_bits
from titan_ext.semi_sync.wire.reductions import CodedReduction


def cosine_basis(size: int) -> torch.Tensor:
    """The orthonormal DCT-II matrix ``[size, size]``: its product with a vector are the coefficients."""
    place = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * place + 1) * place[:, None] / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float()


def tile_sides(shape: torch.Size, largest: int) -> tuple[int, int]:
    """Rows and columns of a tile of a tensor seen as a matrix: the largest divisors that are small enough."""
    rows, columns = _as_matrix(shape)
    return tuple(max(side for side in range(1, largest + 1) if size % side == 0) for size in (rows, columns))


def _as_matrix(shape: torch.Size) -> tuple[int, int]:
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())


class StrongestCoefficients(Codec):
    """The largest values of every tile in fp32, with their places in 12 bits each.

    Args:
        tiles: count and elements of the tiles, in the order of the values.
        kept: values that travel of each tile, if it has as many.
    """

    sparse = True

    def __init__(self, tiles: Sequence[tuple[int, int]], kept: int) -> None:
        self._tiles = [(count, size, min(kept, size)) for count, size in tiles if count * size]
        self._sent = sum(count * kept for count, _, kept in self._tiles)
        self._filling = -self._sent % 8  # so that a message is of whole words

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
        return [(part.view(count, size), kept) for part, (count, size, kept) in zip(parts, self._tiles)]

    def _sent_in(self, message: torch.Tensor, values: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        strongest = message[: 4 * self._sent].view(torch.float32)
        places = unpack_12_bits(message[4 * self._sent :])
        found, start = [], 0
        for tiles, kept in self._split(values):
            end = start + len(tiles) * kept
            found.append((tiles, places[start:end].view(-1, kept), strongest[start:end].view(-1, kept)))
            start = end
        return found


class SignRow(SyncedRow):
    """Sends the momentum's coefficients, tile after tile; the sign of what comes back moves the parameters."""

    any_layout = False
    takes_lost = True

    def __init__(self, row, names, view, config, device=None) -> None:
        super().__init__(row, names, view, config, device)
        self._sides = [tile_sides(shape, config.demo_chunk) if shape.numel() else (1, 1) for shape in self._shapes]
        self._bases = {side: cosine_basis(side).to(self.device) for sides in self._sides for side in sides}
        tiles = [
            (shape.numel() // math.prod(sides), math.prod(sides)) for shape, sides in zip(self._shapes, self._sides)
        ]
        self.reduction = CodedReduction(StrongestCoefficients(tiles, config.demo_kept), max(1, self.elements))

    @torch.no_grad()
    def write(self, out: torch.Tensor, clock: int) -> None:
        """The coefficients."""
        for part, momentum, sides in zip(self.split(out), self.locals(), self._sides):
            part.view(-1).copy_(self._transform(momentum.to(out), sides))

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """A step of each parameter's learning rate against the sign."""
        parameters = self.view.tensors(PARAMETERS, self.names)
        rates = self.view.tensors("rate", self.names)
        for part, parameter, rate, sides in zip(self.split(total), parameters, rates, self._sides):
            parameter.sub_((self._inverse(part, sides).sign_() * rate.to(part)).to(parameter))

    @torch.no_grad()
    def take_lost(self, lost: torch.Tensor) -> None:
        """What was not sent is what remains of the momentum."""
        for part, momentum, sides in zip(self.split(lost), self.locals(), self._sides):
            momentum.copy_(self._inverse(part, sides))

    def shared_state(self) -> dict[str, dict[str, Any]]:
        """The parameters: all sites hold the same."""
        return {name: {"value": value} for name, value in zip(self.names, self.global_values())}

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A member's parameters, without momentum."""
        self.load(self.shared_state(), state)
        if self.elements:
            torch._foreach_zero_(self.locals())

    def checkpoint_state(self) -> dict[str, Any]:
        """Nothing: the model's and the optimizer's own checkpoints hold all there is."""
        return {}

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing to restore."""

    def global_values(self) -> list[torch.Tensor]:
        """The parameters themselves."""
        return self.view.tensors(PARAMETERS, self.names)

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
    fixed={"outer_optimizer": "average", "codec": "fp32", "weighting": "uniform", "sync_every": 1, "aggregation": "mean"},
    sync_every=1,
    outer_optimizer="average",
    demo_chunk=64,
    demo_kept=32,
)
def demo(config) -> SyncPlan:
    """One row of momentum for each fragment, every step."""
    return SyncPlan(
        tuple(
            SyncRow(kind=SignRow, state="momentum", fragment=fragment, period=1, retry=False)
            for fragment in range(config.num_fragments)
        )
    )
