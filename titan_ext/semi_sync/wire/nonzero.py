"""Summing tensors of which most elements are zero: what is not zero travels, and loses nothing.

Values are cut into blocks, and each block is written in whichever of three ways is shortest for it: all values; a bit for
each element and the values that are not zero; or two bytes of place for each of these (arXiv 2504.05153 counts four). A
block of n elements with k that are not zero takes ``4 n``, ``n / 8 + 4 k`` or ``6 k`` bytes, each part in whole words.
"""

from collections.abc import Sequence

import torch

from titan_ext.semi_sync.wire.collectives import ByteCollectives, MessagesInTurn, overlap
from titan_ext.semi_sync.wire.manager import QuorumWire
from titan_ext.semi_sync.wire.reductions import UNDER_WAY, Reduction, RoundFacts, Turns

BLOCK = 2**16
"""Elements of a block: two bytes address one."""
_DENSE, _BITMASK, _INDEX = range(3)
_HEADER = 4
"""Bytes before each block: how it is written, and how many of its elements are not zero, in one int32."""


def block_bytes(numel: int, nonzero: int) -> tuple[int, int]:
    """Bytes of a block without its header, and the way to write it that takes no more."""
    ways = {
        _DENSE: 4 * numel,
        _BITMASK: _words(-(-numel // 8)) + 4 * nonzero,
        _INDEX: _words(2 * nonzero) + 4 * nonzero,
    }
    way = min(ways, key=lambda each: ways[each])
    return ways[way], way


def encode(values: torch.Tensor) -> torch.Tensor:
    """Fp32 ``[numel]`` as bytes, uint8."""
    parts = []
    for block in values.split(BLOCK):
        places = block.nonzero().view(-1)
        _, way = block_bytes(len(block), len(places))
        parts.append(
            torch.tensor([way * 2**24 + len(places)], dtype=torch.int32, device=values.device).view(torch.uint8)
        )
        if way == _BITMASK:
            parts.append(_padded(_packed_bits(block != 0)))
        elif way == _INDEX:
            # torch has no arithmetic of uint16: the upper half of places wraps to negative numbers.
            parts.append(_padded(places.to(torch.int16).view(torch.uint8)))
        parts.append((block if way == _DENSE else block[places]).contiguous().view(torch.uint8))
    return torch.cat(parts) if parts else values.new_empty(0, dtype=torch.uint8)


def accumulate(message: torch.Tensor, values: torch.Tensor) -> None:
    """Add what was encoded to fp32 ``values [numel]``; what follows the message does not matter."""
    start = 0

    def take(count: int) -> torch.Tensor:
        nonlocal start
        # A copy begins where any type may.
        part, start = message[start : start + count].clone(), start + _words(count)
        return part

    for block in values.split(BLOCK):
        way, count = divmod(int(take(_HEADER).view(torch.int32)), 2**24)
        if way == _DENSE:
            block.add_(take(4 * len(block)).view(torch.float32))
            continue
        if way == _BITMASK:
            places = _bits(take(-(-len(block) // 8)))[: len(block)].nonzero().view(-1)
        else:
            places = take(2 * count).view(torch.int16).to(torch.int64) & (BLOCK - 1)
        block.index_add_(0, places, take(4 * count).view(torch.float32))


class NonzeroSum(Reduction):
    """Every site gets every other one's values that are not zero, and sums all in the order of the sites.

    Args:
        bucket_elements: elements handed to the wire at once.
        density: share of elements that are expected not to be zero; only ``wire_bytes`` goes by it.
    """

    def __init__(self, bucket_elements: int, density: float = 1.0) -> None:
        self._bucket_elements = bucket_elements
        self._density = density

    def wire_bytes(self, numel: int, sites: int) -> int:
        """Expected of a contribution of so many elements; the ledger counts what was sent."""
        whole, rest = divmod(numel, BLOCK)
        expected = sum(
            count * (block_bytes(size, round(self._density * size))[0] + _HEADER)
            for count, size in ((whole, BLOCK), (1, rest))
            if size
        )
        return (sites - 1) * expected

    def turns(self, numel: int, sites: int) -> Turns:
        return Turns(peers=sites - 1, buckets=-(-numel // self._bucket_elements), at_most=UNDER_WAY, before=1)

    def reduce(
        self, manager: QuorumWire, values: torch.Tensor, of: RoundFacts, residual: torch.Tensor | None = None
    ) -> None:
        if residual is not None:
            residual.zero_()
        wire = ByteCollectives(manager, of.now)
        if wire.sites == 1 or not values.numel():
            return
        buckets = values.split(self._bucket_elements)
        messages = [encode(bucket) for bucket in buckets]
        own_sizes = torch.tensor([len(message) for message in messages], dtype=torch.int64)
        gathered, announced = wire.gather(own_sizes.view(torch.uint8))
        announced.wait()
        if manager.errored() is None:
            sizes = gathered.cpu().view(torch.int64).view(wire.sites, -1).T.tolist()
            parts = enumerate(zip(buckets, messages, sizes, strict=True), start=1)
            overlap(wire, (_sum_bucket(wire, tag, *part) for tag, part in parts), UNDER_WAY)
        self._traffic += wire.traffic


def _sum_bucket(
    wire: ByteCollectives, tag: int, bucket: torch.Tensor, message: torch.Tensor, sizes: Sequence[int]
) -> MessagesInTurn:
    """Replace a bucket by its sum; ``sizes`` are those of all sites' messages, zeros of which nothing is known."""
    received, messages = wire.exchange_uneven([message] * wire.sites, sizes, tag)
    yield messages
    if not messages.failed:
        bucket.zero_()
        for theirs in received:
            accumulate(theirs.to(bucket.device), bucket)


def _words(size: int) -> int:
    return -(-size // 4) * 4


def _padded(message: torch.Tensor) -> torch.Tensor:
    """With zeros up to whole words."""
    return torch.nn.functional.pad(message, (0, _words(len(message)) - len(message)))


def _packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bool ``[n]`` as uint8, eight a byte."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(-1)
