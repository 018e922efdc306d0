"""A site's documents as an endless or finite stream of packed sequences."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset, get_worker_info
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from titan_ext.data.corpora.ranges import PIECE_BYTES, pieces
from titan_ext.data.feed import Feed
from titan_ext.data.packing import Cursor, Sample, pack
from titan_ext.data.progress import Progress
from titan_ext.errors import UserError


class PackedTextDataset(IterableDataset, Stateful):
    """Packed sequences of one data-parallel rank.

    Endless, each rank (and loader worker) reads its own part of the documents, over and over, each
    epoch in an order of its own. Finite, one pass, every rank must end after as many sequences as
    the others, or they would wait for each other for ever; so all ranks pack the same documents and
    take turns with the sequences, and the last incomplete turn is dropped.

    Args:
        feed: The site's documents.
        tokenizer: Splits text into tokens; its begin and end marks are added where it has them.
        seq_len: Tokens of a sequence.
        dp_rank: This rank among those with different data.
        dp_world_size: How many they are.
        infinite: Whether to start again at the end.
    """

    def __init__(
        self,
        feed: Feed,
        tokenizer: BaseTokenizer,
        seq_len: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        infinite: bool = True,
    ) -> None:
        self._feed = feed
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._dp_rank = dp_rank
        self._dp_world_size = dp_world_size
        self._infinite = infinite
        self._cursor = Cursor()
        self._start: Progress | None = None
        self._told_of_cut = False
        self.identify = False
        """Whether sequences also say whose their tokens are (``titan_ext.data.packing.IDENTITY``)."""

    def __iter__(self) -> Iterator[Sample]:
        """Sequences from the cursor on; a finite pass that has ended starts anew."""
        shard, shards = self._own_shard()
        turns, mine = (1, 0) if self._infinite else (self._dp_world_size, self._dp_rank)
        turn: list[Sample] = []
        self._begin()
        documents = self._documents(shard, shards)
        for cursor, sample in pack(documents, self._seq_len, self._cursor.offset, self.identify):
            turn.append(sample)
            if len(turn) == turns:
                # Before the yield: the loader asks for the state while this generator stands there.
                self._cursor = replace(cursor, place=cursor.place.place, piece=cursor.place.piece)
                yield turn[mine]
                turn = []
        self._cursor = Cursor()

    def check(self, batch_size: int, workers: int) -> None:
        """Reads one batch's worth of text, so that what is wrong with a corpus shows before training.

        Args:
            batch_size: Sequences of a batch.
            workers: Loader workers, each of which makes batches of its own; 0 counts as 1.

        Raises:
            UserError: there is too little text for one batch, or it cannot be read.
        """
        workers = max(workers, 1)
        self._feed.check(self._dp_world_size * workers if self._infinite else 1)
        needed = batch_size * self._seq_len * (1 if self._infinite else self._dp_world_size)
        found = [self._count(worker, workers, needed) for worker in range(workers)]
        # A finite pass may leave a worker idle; an endless one would make it repeat a few words.
        if (min(found) if self._infinite else max(found)) < needed:
            raise TooLittleText(
                f"data = {self._feed.name!r}: too little text for one batch: {min(found)} tokens of the {needed} "
                f"that data-parallel rank {self._dp_rank} of {self._dp_world_size} needs (seq_len {self._seq_len}, "
                f"batch size {batch_size}, {workers} reader(s)); use more text or a smaller batch"
            )

    def state_dict(self) -> dict[str, Any]:
        """The cursor and whose it is: a few numbers, whatever the corpus."""
        self._begin()
        shard, shards = self._own_shard()
        return asdict(self._cursor) | {"shard": shard, "shards": shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where a dataset of the same settings and the same part of the documents had come to."""
        self._cursor = Cursor(
            state_dict["epoch"], state_dict["place"], state_dict["offset"], state_dict.get("piece", 0)
        )

    def start_from(self, progress: Progress) -> None:
        """Takes up where the site's readers had come to, however many they were."""
        self._start = progress

    def _begin(self) -> None:
        # Not before: only the worker that reads knows which reader it is.
        if self._start is not None:
            self._cursor, self._start = self._start.cursor(*self._own_shard()), None

    def _own_shard(self) -> tuple[int, int]:
        worker = get_worker_info()
        return self._shard(worker.id if worker else 0, worker.num_workers if worker else 1)

    def _shard(self, worker: int, workers: int) -> tuple[int, int]:
        if self._infinite:
            return self._dp_rank * workers + worker, self._dp_world_size * workers
        return worker, workers

    def _documents(self, shard: int, shards: int) -> Iterator[tuple[int, "_Piece", np.ndarray]]:
        epoch, place, piece = self._cursor.epoch, self._cursor.place, self._cursor.piece
        while True:
            whole_epoch, found = place is None, False
            for where, tokens in self._tokens(epoch, place, piece, shard, shards):
                found = True
                yield epoch, where, tokens
            if not self._infinite:
                return
            if whole_epoch and not found:
                raise TooLittleText(f"data = {self._feed.name!r}: no text for reader {shard} of {shards}")
            epoch, place, piece = epoch + 1, None, 0

    def _tokens(
        self, epoch: int, place: Any, first_piece: int, shard: int, shards: int
    ) -> Iterator[tuple["_Piece", np.ndarray]]:
        """Each piece of text and its tokens, from the ``first_piece`` of the document at ``place`` on."""
        for found in self._feed.read(epoch, place, shard, shards):
            for piece, part in enumerate(pieces(found.text) if found.text else ()):
                self._tell_of_cut(piece, found.text)
                if piece >= first_piece:
                    tokens = self._tokenizer.encode(part, add_bos=True, add_eos=True)
                    yield _Piece(found.place, piece, found.source, found.number), np.asarray(tokens, np.int64)
            first_piece = 0

    def _tell_of_cut(self, piece: int, text: str) -> None:
        if piece and not self._told_of_cut:
            self._told_of_cut = True
            size = PIECE_BYTES >> 20
            logger.info(
                "data = %r: a document of %s characters, as any of over %.1f MiB, is read as several of about %d MiB",
                self._feed.name,
                f"{len(text):,}",
                1.5 * size,
                size,
            )

    def _count(self, worker: int, workers: int, needed: int) -> int:
        count = 0
        for _, tokens in self._tokens(0, None, 0, *self._shard(worker, workers)):
            count += max(len(tokens) - 1, 0)
            if count >= needed:
                break
        return count


class _Piece(NamedTuple):
    """Where a piece of text stands, and whose it is."""

    place: Any
    piece: int
    source: int
    number: int


class TooLittleText(UserError):
    """A reader has no text, or not enough for a batch."""
