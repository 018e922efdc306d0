"""Documents in reading order, from any place: what packing draws from.

A place is where a document stands in an epoch: plain data, small, and enough for a feed built from
the same settings to go on with that very document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from titan_ext.data.bad_records import BadRecords
from titan_ext.data.corpora.corpus import BUILTIN, Corpus
from titan_ext.data.order import Split, epoch_order, share, split_documents
from titan_ext.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which documents of a corpus are read, and how they are shuffled."""

    seed: int
    shuffle: bool
    shuffle_buffer: int
    split: Split
    holdout_fraction: float
    share_index: int
    share_count: int

    @property
    def split_name(self) -> str:
        """The split, where "auto" is "all"."""
        return "all" if self.split == "auto" else self.split


class Document(NamedTuple):
    """A document, and by what it is known again."""

    place: Any
    """Where it stands in its epoch."""
    text: str
    source: int = 0
    """Number of its file among the feed's ``sources``; 0 in a stream."""
    number: int = -1
    """Its number in the corpus, or 63 bits of its text's hash in a stream: the same whoever reads it, and when."""


class Feed(Protocol):
    """Documents of one site."""

    name: str
    bad_records: BadRecords

    def __str__(self) -> str:
        """What is read, in one line."""

    @property
    def sources(self) -> list[str]:
        """What the ``source`` of a document counts."""

    def read(self, epoch: int, place: Any, shard: int, shards: int) -> Iterator[Document]:
        """Documents of part ``shard`` of ``shards`` in ``epoch``, from ``place`` on (None: the start)."""

    def settings(self) -> dict[str, Any]:
        """What a place means nothing without."""

    def check(self, shards: int) -> None:
        """Raises UserError if a part of ``shards`` would be without a document."""


class CorpusFeed:
    """The site's documents of a local corpus; a place is a position in the shard's order.

    Args:
        corpus: All documents.
        selection: Which of them, and in what order.
        bad_records: What becomes of those that cannot be used.
    """

    def __init__(self, corpus: Corpus, selection: Selection, bad_records: BadRecords | None = None) -> None:
        self.name = corpus.name
        self.corpus = corpus
        self.bad_records = bad_records or BadRecords("error")
        self.bad_records.leave_out(corpus.problems)
        self._selection = selection
        # Modules without a docstring are documents of the built-in prose.
        self._may_be_empty = corpus.name.startswith(BUILTIN)
        chosen = split_documents(len(corpus), selection.split, selection.holdout_fraction)
        self.documents = share(chosen, selection.share_index, selection.share_count)
        units = corpus.units()
        self._units = None if units is None else units[self.documents]

    def __str__(self) -> str:
        taken = "" if len(self.documents) == len(self.corpus) else f", {len(self.documents):,} of them taken"
        empty = f"; files without a document: {self.corpus.empty}" if self.corpus.empty else ""
        return f"{self.corpus.listing}{empty}; {len(self.corpus):,} documents{taken}"

    def order(self, epoch: int) -> np.ndarray:
        """Numbers of the site's documents in the order of an epoch, ``[documents]`` int64."""
        if not self._selection.shuffle:
            return self.documents
        return epoch_order(self.documents, self._units, self._selection.seed, epoch, self._selection.shuffle_buffer)

    @property
    def sources(self) -> list[str]:
        """Names of the corpus's files."""
        return self.corpus.sources

    def read(self, epoch: int, place: int | None, shard: int, shards: int) -> Iterator[Document]:
        """Documents of part ``shard`` of ``shards`` in ``epoch``, from ``place`` on (None: the start)."""
        mine = self.order(epoch)[shard::shards].copy()
        for position in range(place or 0, len(mine)):
            number = int(mine[position])
            read = partial(self.corpus.read, number)
            text = self.bad_records.text(read, f"document {number + 1}", self._may_be_empty)
            yield Document(position, text, self.corpus.source(number), number)

    def settings(self) -> dict[str, Any]:
        """What a position means nothing without; reads a part of the corpus."""
        chosen = self._selection
        return {
            "dataset": self.name,
            "text_key": self.corpus.text_key,
            "content": self.corpus.fingerprint(),
            "documents": len(self.corpus),
            "seed": chosen.seed if chosen.shuffle else None,
            "shuffle_buffer": chosen.shuffle_buffer if chosen.shuffle and self._units is not None else None,
            "split": chosen.split_name,
            "holdout_fraction": chosen.holdout_fraction,
            "share_index": chosen.share_index,
            "share_count": chosen.share_count,
        }

    def check(self, shards: int) -> None:
        """Raises UserError, on every rank alike, if a part of ``shards`` would be without a document."""
        if len(self.documents) >= shards:
            return
        chosen = self._selection
        raise UserError(
            f"data = {self.name!r}: {len(self.documents)} documents (split {chosen.split!r}, part "
            f"{chosen.share_index} of {chosen.share_count}) cannot be dealt to {shards} readers; "
            "use more documents, fewer data-parallel ranks or fewer num_workers"
        )
