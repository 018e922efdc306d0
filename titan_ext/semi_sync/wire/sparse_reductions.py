"""Summing tables of which each site holds some rows: rows travel, not tables.

Every global row has an owner among the sites (its id modulo their number). A site sends each owner the rows it
contributes, the owner sums them in fp32 in the order of the sites, and sends the sums to the holders: about
twice the rows that a site holds, whatever the whole table's size. Who holds what is told anew in each round, a
bit for each row. Rows are coded one by one, so that all holders of a row decode the same bits.
"""

from collections.abc import Sequence

import torch

from titan_ext.optim.rounding import seed_of
from titan_ext.semi_sync.wire.codecs import Codec, Float32
from titan_ext.semi_sync.wire.collectives import ByteCollectives
from titan_ext.semi_sync.wire.manager import QuorumWire
from titan_ext.semi_sync.wire.reductions import Reduction, RoundFacts, Turns
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap

_NUMBER = Float32()


class SparseReduction(Reduction):
    """Sums rows over the sites that contribute them.

    Args:
        rows: which global rows this site's table holds.
        width: columns of a table.
        codec: how rows travel.
        bucket_elements: about how many elements a site hands to the wire at once.
    """

    cuts_anywhere = False

    def __init__(self, rows: TokenRowMap, width: int, codec: Codec, bucket_elements: int) -> None:
        self._rows = rows
        self._width = width
        self._codec = codec
        self._bucket_elements = bucket_elements

    def wire_bytes(self, numel: int, sites: int) -> int:
        """As if owners were even: exact for what has been reduced is ``take_traffic``."""
        if sites == 1 or not numel:
            return 0
        tables = self._codecs(numel)
        row = sum(_message_bytes(codec, width) for codec, width in tables)
        return round(2 * (sites - 1) / sites * self._rows.held.numel() * row) + (sites - 1) * self._bitmap_bytes()

    def wire_bytes_among(self, numel: int, holders: torch.Tensor, site: int) -> int:
        """Bytes that a site sends where it is known who holds what.

        Args:
            numel: elements of the message.
            holders: which site holds which row, bool ``[sites, total]``; all of them contribute.
            site: its place among the sites.
        """
        sites, total = holders.shape
        if sites == 1 or not numel:
            return 0
        owned = torch.arange(total) % sites == site
        to_owners = int((holders[site] & ~owned).sum())
        to_holders = int(holders[:, owned].sum()) - int(holders[site, owned].sum())
        row = sum(_message_bytes(codec, width) for codec, width in self._codecs(numel))
        return round((to_owners + to_holders) * row) + (sites - 1) * self._bitmap_bytes()

    def turns(self, numel: int, sites: int) -> Turns:
        width = sum(width for _, width in self._codecs(numel))
        buckets = -(-self._rows.total // self._rows_at_once(max(1, width), sites))
        return Turns(peers=sites - 1, buckets=max(1, buckets), hops=2, before=1)

    def reduce(
        self,
        manager: QuorumWire,
        values: torch.Tensor,
        of: RoundFacts,
        residual: torch.Tensor | None = None,
    ) -> None:
        if residual is not None:
            residual.zero_()
        wire = ByteCollectives(manager, of.now)
        if wire.sites == 1 or not values.numel():
            return
        codecs = self._codecs(values.numel())
        tables = list(zip(codecs, self._tables(values, codecs), self._tables(residual, codecs), strict=True))
        holders = self._holders(wire)
        if manager.errored() is not None:
            self._traffic += wire.traffic
            return
        exchange = _SparseExchange(wire, holders, self._senders(holders, of.weights))
        places = torch.full((self._rows.total,), -1)
        held = self._rows.ids >= 0
        places[self._rows.ids[held]] = torch.arange(self._rows.rows)[held]
        step = self._rows_at_once(sum(width for _, width in codecs), wire.sites)
        for start in range(0, self._rows.total, step):
            seed = seed_of(of.step, start, wire.rank)
            exchange.run(start, min(start + step, self._rows.total), places, tables, seed)
        self._traffic += wire.traffic

    def _rows_at_once(self, width: int, sites: int) -> int:
        return max(1, self._bucket_elements // width) * sites

    def _senders(self, holders: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Which site sends which row: bool ``[sites, total]``."""
        return holders & (torch.tensor(list(weights)) > 0)[:, None]

    def _codecs(self, numel: int) -> list[tuple[Codec, int]]:
        """Codec and columns of each table of a message: whole tables, then maybe a number for each row."""
        tables, rest = divmod(numel, self._rows.rows * self._width)
        return [(self._codec, self._width)] * tables + [(_NUMBER, 1)] * (rest // self._rows.rows)

    def _tables(self, flat: torch.Tensor | None, codecs: list[tuple[Codec, int]]) -> list[torch.Tensor | None]:
        if flat is None:
            return [None] * len(codecs)
        parts = flat.split([self._rows.rows * width for _, width in codecs])
        return [part.view(self._rows.rows, width) for part, (_, width) in zip(parts, codecs, strict=True)]

    def _bitmap_bytes(self) -> int:
        return -(-self._rows.total // 32) * 4

    def _holders(self, wire: ByteCollectives) -> torch.Tensor:
        """Who holds which row: bool ``[sites, total]``."""
        held = torch.zeros(8 * self._bitmap_bytes(), dtype=torch.uint8)
        held[self._rows.held] = 1
        shifts = torch.arange(8, dtype=torch.uint8)
        gathered, work = wire.gather((held.view(-1, 8) << shifts).sum(dim=1, dtype=torch.uint8))
        work.wait()
        bits = (gathered.cpu()[:, :, None] >> shifts) & 1
        return bits.view(wire.sites, -1)[:, : self._rows.total].bool()


class SparseTransfer(SparseReduction):
    """Every holder gets the row of one site: of its holders the one that comes first.

    ``weights`` are places in that order, the lowest first.
    """

    def _senders(self, holders: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        senders, taken = torch.zeros_like(holders), torch.zeros_like(holders[0])
        for site in sorted(range(len(weights)), key=lambda each: weights[each]):
            senders[site] = holders[site] & ~taken
            taken |= holders[site]
        return senders


class _SparseExchange:
    """Rows to their owners, sums back to the holders."""

    def __init__(self, wire: ByteCollectives, holders: torch.Tensor, senders: torch.Tensor) -> None:
        self._wire, self._rank, self._sites = wire, wire.rank, wire.sites
        self._holders, self._senders = holders, senders

    def run(
        self,
        start: int,
        stop: int,
        places: torch.Tensor,
        tables: list[tuple[tuple[Codec, int], torch.Tensor, torch.Tensor | None]],
        seed: int,
    ) -> None:
        """Sum the rows with ids from ``start`` to below ``stop``.

        An owner need not hold a row, so it could feed back nothing of what the coding of sums loses: they are rounded at
        random instead.
        """
        device = tables[0][1].device
        owned = [self._owned(start, stop, owner) for owner in range(self._sites)]
        mine = owned[self._rank]
        codecs = [codec for codec, _, _ in tables]

        outgoing = [places[ids[self._senders[self._rank, ids]]].to(device) for ids in owned]
        messages = [self._encode(tables, chosen) for chosen in outgoing]
        incoming = [self._senders[site, mine].nonzero().squeeze(1).to(device) for site in range(self._sites)]
        received = self._exchange(messages, [len(each) for each in incoming], codecs, device)
        # -0.0 is what leaves every number as it is when it is added, -0.0 too.
        sums = [torch.full((len(mine), width), -0.0, device=device) for _, width in codecs]
        for message, at in zip(received, incoming, strict=True):
            for total, part in zip(sums, self._decode(message, codecs, len(at)), strict=True):
                total.index_add_(0, at, part)

        sums = [
            _dithered(codec, total, seed_of(seed, place))
            for place, (codec, total) in enumerate(zip(codecs, sums, strict=True))
        ]
        wanted = [self._holders[site, mine].nonzero().squeeze(1).to(device) for site in range(self._sites)]
        summed = [(codec, total, None) for codec, total in zip(codecs, sums, strict=True)]
        back = [self._encode(summed, at) for at in wanted]
        own = [places[ids[self._holders[self._rank, ids]]].to(device) for ids in owned]
        received = self._exchange(back, [len(each) for each in own], codecs, device)
        for message, at in zip(received, own, strict=True):
            for (_, table, _), part in zip(tables, self._decode(message, codecs, len(at)), strict=True):
                table[at] = part

    def _owned(self, start: int, stop: int, owner: int) -> torch.Tensor:
        first = start + (owner - start) % self._sites
        return torch.arange(first, max(first, stop), self._sites)

    def _encode(self, tables, chosen: torch.Tensor) -> torch.Tensor:
        """The chosen rows of all tables as one message; what the codec takes away from them goes into ``residual``."""
        parts = []
        for (codec, width), table, residual in tables:
            rows = _padded(table[chosen], codec)
            message = torch.empty(codec.wire_bytes(rows.numel()), dtype=torch.uint8, device=table.device)
            codec.encode(rows.view(-1), message)
            parts.append(_to_words(message))
            if residual is not None:
                decoded = torch.empty_like(rows)
                codec.decode(message, decoded.view(-1))
                residual[chosen] = table[chosen] - decoded[:, :width]
        return torch.cat(parts)

    def _decode(self, message: torch.Tensor, codecs: list[tuple[Codec, int]], rows: int) -> list[torch.Tensor]:
        """The rows of each table in a message."""
        decoded, start = [], 0
        for codec, width in codecs:
            values = torch.empty(rows, _padded_width(codec, width), device=message.device)
            size = codec.wire_bytes(values.numel())
            codec.decode(message[start : start + size], values.view(-1))
            decoded.append(values[:, :width])
            start += -(-size // 4) * 4
        return decoded

    def _exchange(
        self, messages: list[torch.Tensor], rows: list[int], codecs: list[tuple[Codec, int]], device: torch.device
    ) -> list[torch.Tensor]:
        """Message i goes to site i; what comes in return."""
        sizes = [sum(_rows_bytes(codec, width, count) for codec, width in codecs) for count in rows]
        received, work = self._wire.exchange_uneven(messages, sizes)
        work.wait()
        return [each.to(device) for each in received]


def _padded_width(codec: Codec, width: int) -> int:
    return -(-width // codec.granularity) * codec.granularity


def _padded(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    missing = _padded_width(codec, rows.shape[1]) - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)).contiguous()


def _dithered(codec: tuple[Codec, int], rows: torch.Tensor, seed: int) -> torch.Tensor:
    coded, width = codec
    padded = _padded(rows, coded)
    coded.dither(padded.view(-1), seed)
    return padded[:, :width]


def _to_words(message: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(message, (0, -message.numel() % 4))


def _message_bytes(codec: Codec, width: int) -> float:
    """Bytes of one row among many."""
    return codec.wire_bytes(_padded_width(codec, width))


def _rows_bytes(codec: Codec, width: int, rows: int) -> int:
    return -(-codec.wire_bytes(rows * _padded_width(codec, width)) // 4) * 4
