"""Codecs: how a flat fp32 tensor travels between sites, as bytes.

Every message has a size that depends on the number of elements alone, so all sites know what to
expect and the ledger can state it beforehand. Writing and reading go piece by piece through scratch
space that stays in the processor's cache: several passes over a large tensor would each wait for memory.

A codec is a frozen dataclass whose fields are its settings: ``[semi_sync.NAME]`` in a configuration, where NAME is
what it is registered under.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar

import torch

from titan_ext.semi_sync.registry import Registry

CODECS: "Registry[type[Codec]]" = Registry("codec")
"""Codecs by the name that ``codec`` accepts: ``@register_codec("name")`` adds one."""

_BLOCK = 256  # elements that share a scale
_CHUNK = 4096  # elements among which the largest are sought; 12 bits address one
_PIECE = 2**17  # elements worked on at a time on a CPU


register_codec = CODECS.register
"""Decorate a frozen dataclass that is a ``Codec``, so that ``codec = "name"`` selects it."""


@dataclass(frozen=True)
class Codec(ABC):
    """A way to write fp32 values as bytes."""

    lossless: ClassVar[bool] = False
    """Whether what is read is what was written."""

    sparse: ClassVar[bool] = False
    """Whether a message holds only some of the elements, so that messages cannot be summed shard by shard."""

    error_feedback: ClassVar[bool] = False
    """Whether what it takes away is fed back unless the configuration says otherwise."""

    granularity: ClassVar[int] = 1
    """Elements that belong together; a shard's size is a multiple of it."""

    @abstractmethod
    def wire_bytes(self, numel: int) -> int:
        """Bytes of the message for ``numel`` elements, a multiple of ``granularity``."""

    @abstractmethod
    def encode(self, values: torch.Tensor, message: torch.Tensor) -> None:
        """Write fp32 ``values [numel]`` into ``message`` (uint8 ``[wire_bytes(numel)]``)."""

    @abstractmethod
    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        """The inverse of ``encode``, up to its loss: overwrites fp32 ``values [numel]``."""

    @abstractmethod
    def accumulate(self, message: torch.Tensor, values: torch.Tensor) -> None:
        """Add what ``decode`` would write to ``values``."""

    def encode_in_place(self, values: torch.Tensor, message: torch.Tensor, lost: torch.Tensor | None = None) -> None:
        """``encode`` and then ``decode`` into the values; what that takes away from them overwrites ``lost [numel]``."""
        self.encode(values, message)
        if lost is not None:
            lost.copy_(values)
        self.decode(message, values)
        if lost is not None:
            lost.sub_(values)

    def dither(self, values: torch.Tensor, seed: int) -> None:  # noqa: B027 — nothing to do by default
        """Round fp32 ``values [numel]`` in place to what a message carries, right on average, where nobody can keep what
        is lost and the codec has levels; encoding then adds no loss."""

    def combine(self, messages: Sequence[torch.Tensor] | torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite ``values`` with the sum of all messages, in their order."""
        self.decode(messages[0], values)
        for message in messages[1:]:
            self.accumulate(message, values)


@register_codec("fp32")
@dataclass(frozen=True)
class Float32(Codec):
    """Four bytes an element; loses nothing."""

    lossless = True

    def wire_bytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> None:
        message.view(torch.float32).copy_(values)

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        values.copy_(message.view(torch.float32))

    def accumulate(self, message: torch.Tensor, values: torch.Tensor) -> None:
        values.add_(message.view(torch.float32))


@register_codec("bf16")
@dataclass(frozen=True)
class BFloat16(Codec):
    """Two bytes an element; relative error at most 2**-8."""

    def wire_bytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> None:
        message.view(torch.bfloat16).copy_(values)

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        values.copy_(message.view(torch.bfloat16))

    def accumulate(self, message: torch.Tensor, values: torch.Tensor) -> None:
        values.add_(message.view(torch.bfloat16))


@register_codec("int8")
@dataclass(frozen=True)
class Int8(Codec):
    """One byte an element and a scale for each block of 256; error at most absmax / 254 of the block."""

    error_feedback = True
    granularity = _BLOCK
    levels: ClassVar[int] = 127
    _width: ClassVar[int] = _BLOCK  # bytes of a block's codes

    def wire_bytes(self, numel: int) -> int:
        return numel // _BLOCK * (self._width + 4)

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> None:
        for blocks, codes, scales in self._pieces(values, message):
            self._encode_blocks(blocks, codes, scales)

    def encode_in_place(self, values: torch.Tensor, message: torch.Tensor, lost: torch.Tensor | None = None) -> None:
        lost_pieces = repeat(None) if lost is None else lost.view(-1, _BLOCK).split(self._rows(values))
        for (blocks, codes, scales), lost_blocks in zip(self._pieces(values, message), lost_pieces, strict=False):
            scaled = self._encode_blocks(blocks, codes, scales).mul_(scales[:, None])
            if lost_blocks is not None:
                torch.sub(blocks, scaled, out=lost_blocks)
            blocks.copy_(scaled)

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        for blocks, codes, scales in self._pieces(values, message):
            torch.mul(self._unpack(codes), scales[:, None], out=blocks)

    def accumulate(self, message: torch.Tensor, values: torch.Tensor) -> None:
        for blocks, codes, scales in self._pieces(values, message):
            # Not addcmul, which rounds once or twice as it was compiled: several sites may add up the same messages.
            blocks.add_(self._unpack(codes) * scales[:, None])

    def dither(self, values: torch.Tensor, seed: int) -> None:
        generator = torch.Generator(values.device).manual_seed(seed)
        blocks = values.view(-1, _BLOCK)
        scales = blocks.abs().amax(dim=1, keepdim=True).div_(self.levels).clamp_(min=torch.finfo(torch.float32).tiny)
        noise = torch.rand(blocks.shape, generator=generator, device=values.device)
        blocks.div_(scales).add_(noise).floor_().clamp_(-self.levels, self.levels).mul_(scales)

    def _pieces(
        self, values: torch.Tensor, message: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Blocks, their codes and their scales, some at a time."""
        blocks = values.view(-1, _BLOCK)
        split = blocks.shape[0] * self._width
        codes, scales = message[:split].view(-1, self._width), message[split:].view(torch.float32)
        rows = self._rows(values)
        yield from zip(blocks.split(rows), codes.split(rows), scales.split(rows), strict=True)

    def _rows(self, values: torch.Tensor) -> int:
        """Blocks that are worked on at a time."""
        return _PIECE // _BLOCK if values.device.type == "cpu" else max(1, values.numel() // _BLOCK)

    def _encode_blocks(self, blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Write codes and scales of fp32 ``blocks [count, 256]``; returns the codes as fp32."""
        scaled = blocks.abs()
        torch.amax(scaled, dim=1, out=scales)
        scales.div_(self.levels)
        # A block of zeros has no scale; any will do, and dividing by it must not give NaN.
        torch.div(blocks, scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], out=scaled)
        self._pack(scaled.round_(), codes)  # of at most the levels: the largest is the scale's, up to a bit
        return scaled

    def _pack(self, rounded: torch.Tensor, codes: torch.Tensor) -> None:
        codes.view(torch.int8).copy_(rounded)

    def _unpack(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8)


@register_codec("int4")
@dataclass(frozen=True)
class Int4(Int8):
    """Half a byte an element and a scale for each block of 256; error at most absmax / 14 of the block."""

    levels = 7
    _width = _BLOCK // 2

    def _pack(self, rounded: torch.Tensor, codes: torch.Tensor) -> None:
        # The block's first half in the low bits, its second in the high ones.
        low, high = rounded.chunk(2, dim=1)
        codes.copy_(torch.add(low, high, alpha=16).add_(8 + 8 * 16))

    def _unpack(self, codes: torch.Tensor) -> torch.Tensor:
        both = codes.new_empty(codes.shape[0], _BLOCK, dtype=torch.int8)
        both[:, : self._width] = codes & 15
        both[:, self._width :] = codes >> 4
        return both.sub_(8)


@register_codec("topk")
@dataclass(frozen=True)
class TopK(Codec):
    """The largest values of every 4096 elements in fp32, with their places in 12 bits each.

    Raises:
        ValueError: the density is outside its range.
    """

    density: float = 0.01
    """Share of the elements that travel, above 0 and at most 1."""

    sparse = True
    error_feedback = True
    granularity = _CHUNK

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density = {self.density!r}: must be above 0 and at most 1")

    @property
    def kept(self) -> int:
        """Values of a chunk that travel: an even number, since two places share three bytes."""
        return min(_CHUNK, 2 * math.ceil(self.density * _CHUNK / 2))

    def wire_bytes(self, numel: int) -> int:
        # Whole words, so that the next message in a buffer starts where fp32 may.
        return -(-(numel // _CHUNK * (4 * self.kept + 3 * self.kept // 2)) // 4) * 4

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> None:
        chunks = values.view(-1, _CHUNK)
        kept, places = self._split(message, len(chunks))
        found = chunks.abs().topk(self.kept, dim=1, sorted=False).indices.sort(dim=1).values
        kept.copy_(chunks.gather(1, found))
        places.copy_(pack_12_bits(found.view(-1)))

    def decode(self, message: torch.Tensor, values: torch.Tensor) -> None:
        values.zero_()
        self.accumulate(message, values)

    def accumulate(self, message: torch.Tensor, values: torch.Tensor) -> None:
        chunks = values.view(-1, _CHUNK)
        kept, places = self._split(message, len(chunks))
        chunks.scatter_add_(1, unpack_12_bits(places).view(-1, self.kept), kept)

    def _split(self, message: torch.Tensor, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept values, fp32 ``[chunks, kept]``, and the bytes of their places."""
        end = 4 * chunks * self.kept
        places = message[end : end + 3 * chunks * self.kept // 2]
        return message[:end].view(torch.float32).view(chunks, self.kept), places


def pack_12_bits(numbers: torch.Tensor) -> torch.Tensor:
    """An even count of numbers below 4096 as uint8, three bytes for two."""
    first, second = numbers[0::2], numbers[1::2]
    packed = torch.stack([first & 255, (first >> 8) | ((second & 15) << 4), second >> 4], dim=1)
    return packed.to(torch.uint8).view(-1)


def unpack_12_bits(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_12_bits``, int64."""
    low, middle, high = packed.view(-1, 3).to(torch.int64).unbind(dim=1)
    return torch.stack([low | ((middle & 15) << 8), (middle >> 4) | (high << 4)], dim=1).view(-1)
