"""The data loader that torchtitan builds for a site."""

import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, get_args

from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from titan_ext.data.bad_records import BadRecords, OnBadRecord
from titan_ext.data.corpora.corpus import BUILTIN, list_corpus, open_corpus
from titan_ext.data.corpora.listing import Listing
from titan_ext.data.corpora.stream import PREFIX, StreamFeed
from titan_ext.data.dataset import PackedTextDataset
from titan_ext.data.feed import CorpusFeed, Feed, Selection
from titan_ext.data.mix import MixChange, MixedDataLoader, check_mix, corpus_of
from titan_ext.data.order import Split
from titan_ext.data.packing import Sample
from titan_ext.data.progress import Progress, reader_states
from titan_ext.data.remote.cache import FileCache
from titan_ext.data.remote.feed import RemoteFeed
from titan_ext.data.remote.window import Reading
from titan_ext.data.resume import OnChangedData, resume
from titan_ext.data.sources import SourcesDataLoader, SourceTable, all_sources, check_sources
from titan_ext.data.tokenizers.traits import identity
from titan_ext.data.workers import end_with_the_rank, end_workers_with, with_short_errors
from titan_ext.errors import UserError, require
from titan_ext.object_store import RETRY_SECONDS, is_url
from titan_ext.semi_sync.site.ranks import SiteRanks

_SPLITS = get_args(Split)
_MOST_WORKERS = 1024


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
        """The corpus: a file (JSONL, JSON, CSV, Parquet, Arrow, text), a folder, a glob, the URL of one of these
        ("s3://bucket/prefix", "https://host/file.jsonl.zst", any that fsspec knows), "builtin:code", "builtin:docs", or a
        Hugging Face dataset "hf:NAME[:config][:split]"."""

        text_key: str = "text"
        """Key of a JSON object, or column of a table, that holds the text."""

        seed: int = 0
        """Seed of the order of documents; every epoch has an order of its own."""

        shuffle: bool = True
        """Whether documents are shuffled at all."""

        shuffle_buffer: int = 1000
        """Documents shuffled together where a corpus cannot be permuted whole: streams, and groups of rows
        of Parquet and Arrow. They are held in memory. Of a corpus behind a URL, at most so many files, of 256 MiB together,
        are shuffled together, with all their documents."""

        infinite: bool = True
        """Whether to start again at the corpus's end; if not, one pass, of equal length on all ranks."""

        holdout_fraction: float = 0.0
        """Part of the documents, from 0 to below 1, that belongs to the split "validation"."""

        split: Split = "auto"
        """"train" leaves the held-out documents away, "validation" takes only them, "all" takes both. Where names of
        files tell training, validation and test documents apart, "train" takes the training files only, and
        "validation" without a ``holdout_fraction`` those of validation, else of the test; "auto" takes all documents,
        but refuses files of several splits."""

        share_index: int = 0
        """Which part of the corpus is this site's, where several sites share one."""

        share_count: int = 1
        """Sites that share the corpus."""

        on_bad_record: OnBadRecord = "error"
        """What a document does that cannot be used (a broken line of JSON, text that is not UTF-8, a damaged group of
        rows): "error" ends the site, "skip" leaves it out, with a count in the log. ``titan-ext data show --scan``
        finds all of them beforehand."""

        on_changed_data: OnChangedData = "error"
        """What a resume does whose tokenizer, documents, their order, or key is another than the checkpoint's: "error"
        refuses, "continue" goes on at the same place, says what changed, and may read documents of the epoch twice or
        not at all."""

        cache_folder: str = ""
        """Where copies of the files of a corpus behind a URL are kept while they are read, unpacked; processes of a machine
        may share it. Empty: ``titan_ext`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""

        cache_gib: float = 20.0
        """GiB that those copies may take: what was used longest ago is deleted, and fetched again when it is needed. What is
        read at the moment, and the next, stay whatever they take."""

        retry_seconds: float = RETRY_SECONDS
        """How long the server of a URL may be away, from its first failure on, before the site ends."""

        mix: dict[str, float] = field(default_factory=dict)
        """Shares of corpora in the site's tokens, such as {wiki = 0.7, code = 0.3}: each name is a file or folder directly in
        the folder ``dataset``, with its ending or without. They need not sum to 1. Nothing: all of ``dataset`` is one corpus."""

        mix_changes: list[MixChange] = field(default_factory=list)
        """[[data.mix_changes]] tables: other shares from a step on."""

        source: list[SourceTable] = field(default_factory=list)
        """``[[source]]`` tables, in place of ``dataset``: data sources of the site, each of which trains a model of its own
        in a round, one after the other, from the global parameters; the site contributes their mean (Photon's clients,
        arXiv 2411.02908). Other keys of [data] hold for all of them."""

        sources: str = ""
        """A pattern of files or folders, such as "corpus/*": one more source for each, named as it is without ending."""

        def all_sources(self) -> list[SourceTable]:
            """The data sources; none where the site has one corpus.

            Raises:
                UserError: nothing fits the pattern.
            """
            return all_sources(self.source, self.sources, self.retry_seconds)

        @property
        def has_sources(self) -> bool:
            """Whether the site has data sources in place of one corpus."""
            return bool(self.source or self.sources)

        def build(self, **parts: Any) -> Any:
            """The loader: of one corpus, of several in their shares, or of the data sources in turn."""
            if self.has_sources:
                return SourcesDataLoader(self, **parts)
            return MixedDataLoader(self, **parts) if self.mix else ParallelAwareDataloader.Config.build(self, **parts)

        def held_out(self) -> "TextDataLoader.Config | None":
            """The documents that this leaves out of training; None where it takes all."""
            rest = replace(self, split="validation", mix={}, mix_changes=[])
            return rest if self.split == "train" and (self.holdout_fraction > 0 or rest._has_files()) else None

        def _has_files(self) -> bool:
            """Whether there are files that are called as the split is."""
            try:
                return not self.dataset.startswith((PREFIX, BUILTIN)) and bool(self.listing().files)
            except UserError:
                return False

        def listing(self) -> Listing:
            """What of the corpus's files is read and what is not.

            Raises:
                UserError: they are not there, or cannot be meant.
                ReadError: the server of a URL is away.
            """
            if is_url(self.dataset):
                for name in self.mix:
                    corpus_of(self, name)
            if self.dataset.startswith(PREFIX):
                return Listing(self.dataset, notes=["a stream, of which nothing is looked at before it is read"])
            tolerant = self.on_bad_record == "skip"
            return list_corpus(self.dataset, self.text_key, self.split, self.holdout_fraction, tolerant)

        def validate(self) -> None:
            """Raises UserError, naming the key, for a value outside its range."""
            require(self.dataset_path is None, "data.dataset_path", self.dataset_path, "unset: dataset names the path")
            if is_url(self.dataset):
                scheme, _, place = self.dataset.partition("://")
                wanted = f"followed by what is read there: {scheme}://BUCKET/…"
                require(bool(place.strip("/")), "data.dataset", self.dataset, wanted)
            check_mix(self)
            if self.has_sources:
                check_sources(self.all_sources(), self)
            require(self.shuffle_buffer >= 1, "data.shuffle_buffer", self.shuffle_buffer, "at least 1 document")
            require(self.share_count >= 1, "data.share_count", self.share_count, "at least 1 site")
            require(
                0 <= self.share_index < self.share_count,
                "data.share_index",
                self.share_index,
                f"from 0 to share_count - 1 = {self.share_count - 1}",
            )
            require(self.split in _SPLITS, "data.split", self.split, f"one of {list(_SPLITS)}")
            require(0 <= self.holdout_fraction < 1, "data.holdout_fraction", self.holdout_fraction, "from 0 to below 1")
            for key, kind in (("on_bad_record", OnBadRecord), ("on_changed_data", OnChangedData)):
                value, allowed = getattr(self, key), list(get_args(kind))
                require(value in allowed, f"data.{key}", value, f"one of {allowed}")
            # The files of a folder may be called so.
            named = not self.dataset.startswith((PREFIX, BUILTIN))
            require(
                self.split != "validation" or self.holdout_fraction > 0 or named,
                "data.holdout_fraction",
                self.holdout_fraction,
                "above 0 where split = 'validation'",
            )
            require(
                0 <= self.num_workers <= _MOST_WORKERS,
                "data.num_workers",
                self.num_workers,
                f"from 0 to {_MOST_WORKERS}",
            )
            for key in ("prefetch_factor", "persistent_workers"):
                value = getattr(self, key)
                require(not value or self.num_workers > 0, f"data.{key}", value, "left out without data.num_workers")
            prefetch = self.prefetch_factor
            require(prefetch is None or prefetch >= 1, "data.prefetch_factor", prefetch, "at least 1")
            require(self.cache_gib > 0, "data.cache_gib", self.cache_gib, "above 0")
            require(not is_url(self.cache_folder), "data.cache_folder", self.cache_folder, "a folder of this machine")
            require(self.retry_seconds >= 0, "data.retry_seconds", self.retry_seconds, "at least 0")
            require(bool(self.text_key.strip()), "data.text_key", self.text_key, "the name of a field")
            # Inside a worker, the datasets library deals a stream out a second time by itself.
            require(
                self.num_workers <= 1 or not self.dataset.startswith(PREFIX),
                "data.num_workers",
                self.num_workers,
                "0 or 1 for a streamed dataset",
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
        if dp_rank == 0:
            _say(f"data: {feed}")
            read = getattr(tokenizer, "base", tokenizer)
            for note in getattr(read, "notes", ()):
                _say(f"tokenizer {read.tokenizer_path}: {note}")
        dataset = PackedTextDataset(feed, tokenizer, seq_len, dp_rank, dp_world_size, config.infinite)
        dataset.check(local_batch_size, config.num_workers)
        self._feed, self._tokenizer = feed, tokenizer
        self._on_changed_data = config.on_changed_data
        self._readers = {"infinite": config.infinite, "dp_world_size": dp_world_size, "num_workers": config.num_workers}
        self._finite = not config.infinite
        self._ended = self._resumed_at_end = False
        self.notes: list[str] = []
        """What is to be said of the state that was loaded."""
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
            worker_init_fn=end_with_the_rank if config.num_workers else None,
        )

    def identify_tokens(self) -> None:
        """From the next iteration on, batches also say whose their tokens are (``titan_ext.data.packing.IDENTITY``)."""
        self.dataset.identify = True

    @property
    def feed(self) -> Feed:
        """The site's documents."""
        return self._feed

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
            end_workers_with(os.getpid())
        yield from batches if self.num_workers == 0 else with_short_errors(batches)
        self._ended = self._finite

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks, and the settings without which they mean nothing. A collective over the site."""
        ranks: dict[str, Any] = {}
        for each in SiteRanks().gather(super().state_dict()):
            ranks |= each
        return {"ranks": pickle.dumps(ranks), "settings": json.dumps(self._settings | {"ended": self._ended})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the loaders of the state stood.

        Raises:
            UserError: those loaders read another corpus, or in another order; see ``resume``.
        """
        if not state_dict:
            return
        saved = json.loads(state_dict["settings"])
        self._ended = self._resumed_at_end = saved.pop("ended", False)
        ranks = pickle.loads(state_dict["ranks"])
        states = [pickle.loads(state) for state in ranks.values() if isinstance(state, bytes)]
        progress = Progress.of(reader_states(states))
        found = resume(saved, self._settings, progress, self._on_changed_data)
        self.notes = found.notes
        for note in found.notes if self.dp_rank == 0 else ():
            logger.warning("data: %s", note)
        if found.progress is None:
            super().load_state_dict(ranks)
        else:
            self.dataset.start_from(found.progress)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What the positions mean nothing without. Found when it is first needed: it reads a part of the corpus."""
        return self._feed.settings() | self._readers | identity(self._tokenizer)


def open_feed(config: TextDataLoader.Config, bad_records: BadRecords | None = None) -> Feed:
    """The site's documents, as the config selects and orders them.

    Args:
        config: which documents, and how.
        bad_records: what becomes of those that cannot be used; None: what the config says.

    Raises:
        UserError: the corpus cannot be found or read, or the config has data sources in place of one.
    """
    if config.has_sources:
        names = ", ".join(source.name for source in config.all_sources())
        raise UserError(f"data: the site has data sources ({names}) in place of one corpus; name the one that is meant")
    selection = Selection(
        seed=config.seed,
        shuffle=config.shuffle,
        shuffle_buffer=config.shuffle_buffer,
        split=config.split,
        holdout_fraction=config.holdout_fraction,
        share_index=config.share_index,
        share_count=config.share_count,
    )
    bad_records = bad_records or BadRecords(config.on_bad_record)
    if config.dataset.startswith(PREFIX):
        return StreamFeed(config.dataset, config.text_key, selection, bad_records)
    if is_url(config.dataset):
        return _open_remote(config, selection, bad_records)
    corpus = open_corpus(
        config.dataset,
        config.text_key,
        keep=2 * config.shuffle_buffer,
        split=config.split,
        holdout_fraction=config.holdout_fraction,
        tolerant=config.on_bad_record == "skip",
    )
    return CorpusFeed(corpus, selection, bad_records)


def _open_remote(config: TextDataLoader.Config, selection: Selection, bad_records: BadRecords) -> RemoteFeed:
    tolerant = config.on_bad_record == "skip"
    listing = list_corpus(
        config.dataset, config.text_key, config.split, config.holdout_fraction, tolerant, config.retry_seconds
    )
    reading = Reading(config.dataset, config.text_key, 2 * config.shuffle_buffer, tolerant, selection)
    cache = FileCache(config.cache_folder, config.cache_gib, config.retry_seconds)
    return RemoteFeed(listing, reading, cache, bad_records)


@lru_cache
def _say(line: str) -> None:
    """Log a line once: a loader of the same data is built for every validation."""
    logger.info(line)
