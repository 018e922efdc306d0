"""The data loader that torchtitan builds for a site."""

import json
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from titan_ext.data.corpora.corpus import open_corpus
from titan_ext.data.corpora.stream import PREFIX, StreamFeed
from titan_ext.data.dataset import PackedTextDataset
from titan_ext.data.feed import CorpusFeed, Feed, Selection
from titan_ext.data.order import Split
from titan_ext.data.packing import Sample
from titan_ext.data.progress import Progress, reader_states
from titan_ext.errors import UserError
from titan_ext.launcher.processes import die_with_parent
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.trainer.cpu import prepare

prepare()

from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.tools.logging import logger  # noqa: E402

_SPLITS = ("all", "train", "validation")
# Settings that say who reads which documents, not which documents there are and in what order.
_RANKS = {"dp_world_size", "num_workers"}
_DEALING = _RANKS | {"share_index", "share_count"}


class TextDataLoader(ParallelAwareDataloader):
    """Batches of packed text from a site's corpus, for training and for validation.

    Yields ``({"input": [batch, seq_len], "positions": [batch, seq_len]}, labels [batch, seq_len])``,
    int64. ``state_dict`` is small, and a loader of the same settings that loads it goes on with the
    very next batch.

    Args:
        config: See ``Config``.
        dp_world_size: Ranks of the site with different data.
        dp_rank: This one among them.
        tokenizer: The site's tokenizer.
        seq_len: Tokens of a sequence.
        local_batch_size: Sequences of a batch.
        snapshot_every_n_steps: Batches between two states kept by loader workers.

    Raises:
        UserError: a field is out of range, the corpus cannot be read, or has too little text.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        dataset: str = ""
        """The corpus: a file (JSONL, text, Parquet), a folder, a glob, "builtin:code", "builtin:docs",
        or a Hugging Face dataset "hf:NAME[:config][:split]"."""

        text_key: str = "text"
        """Key of a JSON line, or column of a table, that holds the text."""

        seed: int = 0
        """Seed of the order of documents; every epoch has an order of its own."""

        shuffle: bool = True
        """Whether documents are shuffled at all."""

        shuffle_buffer: int = 1000
        """Documents shuffled together where a corpus cannot be permuted whole: streams, and row groups
        of Parquet. They are held in memory."""

        infinite: bool = True
        """Whether to start again at the corpus's end; if not, one pass, of equal length on all ranks."""

        holdout_fraction: float = 0.0
        """Part of the documents, from 0 to below 1, that belongs to the split "validation"."""

        split: Split = "all"
        """"train" leaves the held-out documents away, "validation" takes only them, "all" takes both."""

        share_index: int = 0
        """Which part of the corpus is this site's, where several sites share one."""

        share_count: int = 1
        """Sites that share the corpus."""

        def held_out(self) -> "TextDataLoader.Config | None":
            """The documents that this leaves out of training; None where it takes all."""
            if self.split != "train" or self.holdout_fraction == 0:
                return None
            return replace(self, split="validation")

        def validate(self) -> None:
            """Raises UserError, naming the key, for a value outside its range."""
            _require(self.dataset_path is None, "dataset_path", self.dataset_path, "unset: dataset names the path")
            _require(self.shuffle_buffer >= 1, "shuffle_buffer", self.shuffle_buffer, "at least 1 document")
            _require(self.share_count >= 1, "share_count", self.share_count, "at least 1 site")
            _require(
                0 <= self.share_index < self.share_count,
                "share_index", self.share_index, f"from 0 to share_count - 1 = {self.share_count - 1}",
            )
            _require(self.split in _SPLITS, "split", self.split, f"one of {list(_SPLITS)}")
            _require(0 <= self.holdout_fraction < 1, "holdout_fraction", self.holdout_fraction, "from 0 to below 1")
            _require(
                self.split != "validation" or self.holdout_fraction > 0,
                "holdout_fraction", self.holdout_fraction, "above 0 where split = 'validation'",
            )
            _require(self.num_workers >= 0, "num_workers", self.num_workers, "at least 0")
            # Inside a worker, the datasets library deals a stream out a second time by itself.
            _require(
                self.num_workers <= 1 or not self.dataset.startswith(PREFIX),
                "num_workers", self.num_workers, "0 or 1 for a streamed dataset",
            )

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **kwargs: Any,
    ) -> None:
        config.validate()
        feed = open_feed(config)
        dataset = PackedTextDataset(feed, tokenizer, seq_len, dp_rank, dp_world_size, config.infinite)
        dataset.check(local_batch_size, config.num_workers)
        self._settings = feed.settings() | {
            "infinite": config.infinite,
            "dp_world_size": dp_world_size,
            "num_workers": config.num_workers,
            "vocabulary": tokenizer.get_vocab_size(),
        }
        self._finite = not config.infinite
        self._ended = self._resumed_at_end = False
        super().__init__(
            dataset,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            # A short last batch would not fit a pipeline schedule or a compiled graph.
            drop_last=True,
            num_workers=config.num_workers,
            persistent_workers=config.persistent_workers,
            pin_memory=config.pin_memory,
            prefetch_factor=config.prefetch_factor,
            snapshot_every_n_steps=snapshot_every_n_steps,
            worker_init_fn=_end_with_the_rank if config.num_workers else None,
        )

    def __iter__(self) -> Iterator[Sample]:
        """Batches, from the loaded state on: none where that is the end of a finite pass, which iterating again starts anew.

        Raises:
            UserError: a document is not what its format promises; one line, also from a worker.
        """
        if self._resumed_at_end:
            self._resumed_at_end = False
            return
        self._ended = False
        batches = super().__iter__()
        if self.num_workers:
            _end_workers_with(os.getpid())
        yield from batches if self.num_workers == 0 else _with_short_errors(batches)
        self._ended = self._finite

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks, and the settings without which they mean nothing. A collective over the site."""
        ranks: dict[str, Any] = {}
        for each in SiteRanks().gather(super().state_dict()):
            ranks |= each
        return {"ranks": pickle.dumps(ranks), "settings": json.dumps(self._settings | {"ended": self._ended})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the loaders of the state stood.

        With other ranks or workers the site goes on at its first unfinished document. If the corpus is
        dealt to another number of sites, it goes on at the same part of the epoch.

        Raises:
            UserError: those loaders read another corpus, or in another order.
        """
        if not state_dict:
            return
        saved = json.loads(state_dict["settings"])
        self._ended = self._resumed_at_end = saved.get("ended", False)
        changed = {key: f"{key} was {saved[key]!r}, is {now!r}" for key, now in self._settings.items()
                   if key in saved and saved[key] != now}
        ranks = pickle.loads(state_dict["ranks"])
        if not changed:
            super().load_state_dict(ranks)
            return
        states = [pickle.loads(state) for state in ranks.values() if isinstance(state, bytes)]
        progress = Progress.of(reader_states(states))
        if progress is None or not changed.keys() <= _DEALING:
            raise UserError(
                f"data: the checkpoint's place in the corpus is of other settings ({'; '.join(changed.values())}); restore "
                "them, or start the corpus anew with checkpoint.exclude_from_loading = ['dataloader']"
            )
        if not changed.keys() <= _RANKS:
            progress = progress.shared_among(saved["share_count"], self._settings["share_count"])
        if self.dp_rank == 0:
            what = "; ".join(changed.values())
            logger.info("data: %s: going on at document %d of epoch %d", what, progress.document, progress.epoch)
        self.dataset.start_from(progress)


def open_feed(config: TextDataLoader.Config) -> Feed:
    """The site's documents, as the config selects and orders them.

    Raises:
        UserError: the corpus cannot be found or read.
    """
    selection = Selection(
        seed=config.seed,
        shuffle=config.shuffle,
        shuffle_buffer=config.shuffle_buffer,
        split=config.split,
        holdout_fraction=config.holdout_fraction,
        share_index=config.share_index,
        share_count=config.share_count,
    )
    if config.dataset.startswith(PREFIX):
        return StreamFeed(config.dataset, config.text_key, selection)
    return CorpusFeed(open_corpus(config.dataset, config.text_key, 2 * config.shuffle_buffer), selection)


def _end_with_the_rank(worker: int) -> None:
    """What tells the rank to leave tells its loader workers too; they read on until it has left."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


@cache
def _end_workers_with(process: int) -> None:
    """At the process's end multiprocessing asks its children with SIGTERM, and waits for ever for those that ignore it."""
    del process  # a fork has finalizers of its own
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _with_short_errors(batches: Iterator[Sample]) -> Iterator[Sample]:
    try:
        yield from batches
    except UserError as error:
        # A worker's error arrives with the worker's whole traceback as its message.
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"data.{key} = {value!r}: must be {allowed}")
