"""Codecs: how a flat fp32 tensor travels between sites, as bytes.

Every message has a size that depends on the number of elements alone, so all sites know what to
expect and the ledger can state it beforehand.
"""

import math
from abc import ABC, abstractmethod

import torch

_BLOCK = 256  # elements that share a scale
_CHUNK = 4096  # elements among which the largest are sought; 12 bits address one


class Codec(ABC):
    """A lossy way to write fp32 values as bytes."""

    sparse = False
    """Whether a message holds only some of the elements, so that messages cannot be summed shard by shard."""

    granularity = 1
    """Elements that belong together; a shard's size is a multiple of it."""

    @abstractmethod
    def wire_bytes(self, numel: int) -> int:
        """Bytes of the message for ``numel`` elements, a multiple of ``granularity``."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """fp32 ``[numel]`` to uint8 ``[wire_bytes(numel)]``."""

    @abstractmethod
    def decode(self, message: torch.Tensor) -> torch.Tensor:
        """The inverse of ``encode``, up to its loss."""


class BFloat16(Codec):
    """Two bytes an element; relative error at most 2**-8."""

    def wire_bytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().view(torch.uint8)

    def decode(self, message: torch.Tensor) -> torch.Tensor:
        return message.view(torch.bfloat16).float()


class Int8(Codec):
    """One byte an element and a scale for each block of 256; error at most absmax / 254 of the block."""

    granularity = _BLOCK
    levels = 127

    def wire_bytes(self, numel: int) -> int:
        return numel + 4 * (numel // _BLOCK)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        codes, scales = self._quantize(values)
        return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)])

    def decode(self, message: torch.Tensor) -> torch.Tensor:
        numel = message.numel() // (_BLOCK + 4) * _BLOCK
        return self._dequantize(message[:numel].view(torch.int8), message[numel:])

    def _quantize(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = values.view(-1, _BLOCK)
        scales = blocks.abs().amax(dim=1).div_(self.levels)
        # A block of zeros has no scale; any will do, and dividing by it must not give NaN.
        codes = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
        return codes.clamp_(-self.levels, self.levels).to(torch.int8).view(-1), scales

    def _dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        # The scales start at a byte offset that fp32 alignment may not like: copy them.
        scales = scales.clone().view(torch.float32)
        return (codes.view(-1, _BLOCK).float() * scales[:, None]).view(-1)


class Int4(Int8):
    """Half a byte an element and a scale for each block of 256; error at most absmax / 14 of the block."""

    levels = 7

    def wire_bytes(self, numel: int) -> int:
        return numel // 2 + 4 * (numel // _BLOCK)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        codes, scales = self._quantize(values)
        nibbles = (codes + 8).to(torch.uint8)
        return torch.cat([nibbles[0::2] | (nibbles[1::2] << 4), scales.view(torch.uint8)])

    def decode(self, message: torch.Tensor) -> torch.Tensor:
        packed = message.numel() // (_BLOCK // 2 + 4) * (_BLOCK // 2)
        pairs = message[:packed]
        codes = torch.stack([pairs & 15, pairs >> 4], dim=1).view(-1).to(torch.int8) - 8
        return self._dequantize(codes, message[packed:])


class TopK(Codec):
    """The largest values of every 4096 elements in fp32, with their places in 12 bits each.

    Args:
        density: share of the elements that travel, in (0, 1].
    """

    sparse = True
    granularity = _CHUNK

    def __init__(self, density: float) -> None:
        # Two places share three bytes.
        self.kept = min(_CHUNK, 2 * math.ceil(density * _CHUNK / 2))

    def wire_bytes(self, numel: int) -> int:
        return numel // _CHUNK * (4 * self.kept + 3 * self.kept // 2)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        chunks = values.view(-1, _CHUNK)
        places = chunks.abs().topk(self.kept, dim=1, sorted=False).indices.sort(dim=1).values
        kept = chunks.gather(1, places).contiguous()
        return torch.cat([kept.view(-1).view(torch.uint8), _pack_12_bits(places.view(-1))])

    def decode(self, message: torch.Tensor) -> torch.Tensor:
        chunks = message.numel() // self.wire_bytes(_CHUNK)
        split = chunks * self.kept * 4
        values = message[:split].clone().view(torch.float32).view(chunks, self.kept)
        places = _unpack_12_bits(message[split:]).view(chunks, self.kept)
        return torch.zeros(chunks, _CHUNK, device=message.device).scatter_(1, places, values).view(-1)


def _pack_12_bits(numbers: torch.Tensor) -> torch.Tensor:
    first, second = numbers[0::2], numbers[1::2]
    packed = torch.stack([first & 255, (first >> 8) | ((second & 15) << 4), second >> 4], dim=1)
    return packed.to(torch.uint8).view(-1)


def _unpack_12_bits(packed: torch.Tensor) -> torch.Tensor:
    low, middle, high = packed.view(-1, 3).to(torch.int64).unbind(dim=1)
    return torch.stack([low | ((middle & 15) << 8), (middle >> 4) | (high << 4)], dim=1).view(-1)


CODECS = ("fp32", "bf16", "int8", "int4", "topk")
"""Names that ``codec`` accepts."""


def build_codec(name: str, density: float) -> Codec | None:
    """The codec of a name; None is fp32, which needs none."""
    return {"fp32": None, "bf16": BFloat16(), "int8": Int8(), "int4": Int4(), "topk": TopK(density)}[name]
