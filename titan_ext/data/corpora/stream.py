"""Documents of a Hugging Face dataset, streamed: ``hf:NAME[:config][:split]``.

A stream has no numbering to permute, so it is read in blocks of ``shuffle_buffer`` documents, each
permuted by itself. Unlike a rolling shuffle buffer, whose contents no small state describes, a
block is found again exactly: by the stream's state where it began.
"""

import hashlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from titan_ext.data.bad_records import BadRecords
from titan_ext.data.corpora.files import classify
from titan_ext.data.corpora.fingerprint import digest_of_files
from titan_ext.data.corpora.tree import walk
from titan_ext.data.feed import Document, Selection
from titan_ext.data.order import mix
from titan_ext.error_text import may_pass, reason
from titan_ext.errors import BadRecord, ReadError, UserError

PREFIX = "hf:"


@dataclass(frozen=True, slots=True)
class StreamName:
    """The parts of ``hf:NAME[:config][:split]``; leave the config empty to give a split alone."""

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, spec: str) -> "StreamName":
        """The parts of a name.

        Raises:
            UserError: no name, or more than three parts.
        """
        name, *rest = spec.removeprefix(PREFIX).split(":")
        if not name or len(rest) > 2:
            raise UserError(f"data = {spec!r}: a Hugging Face dataset is 'hf:NAME[:config][:split]'")
        config, split = (*rest, "", "")[:2]
        return cls(name, config or None, split or "train")


class StreamFeed:
    """The site's documents of a streamed dataset; a place is a block's start and a position in it.

    Args:
        spec: The dataset's name.
        text_key: The column of the text.
        selection: Which documents, and in what order.
        bad_records: What becomes of documents that cannot be used.

    Raises:
        UserError: the dataset cannot be resolved, or a record has no text under ``text_key``.
    """

    def __init__(self, spec: str, text_key: str, selection: Selection, bad_records: BadRecords | None = None) -> None:
        self.name = spec
        self.bad_records = bad_records or BadRecords("error")
        self._text_key = text_key
        self._selection = selection
        self._stream, self._text = _open(spec, text_key)

    def __str__(self) -> str:
        return f"{self.name}: a stream"

    @property
    def sources(self) -> list[str]:
        """The stream alone."""
        return [self.name]

    def read(self, epoch: int, place: dict[str, Any] | None, shard: int, shards: int) -> Iterator[Document]:
        """Documents of part ``shard`` of ``shards`` in ``epoch``, from ``place`` on (None: the start)."""
        from datasets.distributed import split_dataset_by_node

        chosen = self._selection
        stream = split_dataset_by_node(
            self._stream, rank=chosen.share_index * shards + shard, world_size=chosen.share_count * shards
        )
        stream.set_epoch(epoch)
        start, block, position = (place["stream"], place["block"], place["position"]) if place else (None, 0, 0)
        if start is not None:
            stream.load_state_dict(deepcopy(start))
        records = iter(stream)
        while texts := [
            self.bad_records.text(partial(self._text, record))
            for record in self._guarded(islice(records, chosen.shuffle_buffer))
        ]:
            for within in range(position, len(texts)):
                text = texts[self._order(len(texts), epoch, block)[within]]
                if self._wanted(text):
                    here = {"stream": start, "block": block, "position": within}
                    yield Document(here, text, number=_digest(text) >> 1)
            # A copy: the stream goes on writing into the state that it hands out.
            start, block, position = deepcopy(stream.state_dict()), block + 1, 0

    def settings(self) -> dict[str, Any]:
        """What a place means nothing without."""
        chosen = self._selection
        return {
            "dataset": self.name,
            "text_key": self._text_key,
            "content": self._content(),
            "seed": chosen.seed if chosen.shuffle else None,
            "shuffle_buffer": chosen.shuffle_buffer,
            "split": chosen.split_name,
            "holdout_fraction": chosen.holdout_fraction,
            "share_index": chosen.share_index,
            "share_count": chosen.share_count,
        }

    def check(self, shards: int) -> None:
        """Nothing: how long a stream is shows only at its end."""

    def _content(self) -> str | None:
        """By what the files of a folder are known again; None for a dataset that lies elsewhere."""
        folder = Path(StreamName.parse(self.name).name)
        if not folder.is_dir():
            return None
        files = [file for path in walk(folder, self.name).files if (file := classify(path)) and file.format != "text"]
        return digest_of_files([(file.path, file.path.stat().st_size) for file in files]).hex()

    def _order(self, count: int, epoch: int, block: int) -> np.ndarray:
        numbers = np.arange(count)
        if not self._selection.shuffle:
            return numbers
        return np.argsort(mix(numbers, self._selection.seed, epoch, block), kind="stable")

    def _wanted(self, text: str) -> bool:
        """A stream's numbering depends on who reads it, so the hold-out goes by the text itself."""
        chosen = self._selection
        if chosen.split_name == "all":
            return True
        held = _digest(text) < chosen.holdout_fraction * 2**64
        return held == (chosen.split == "validation")

    def _guarded(self, records: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from records
        except UserError:
            raise
        except Exception as error:  # whatever the hub, its file systems and formats raise
            kind = ReadError if may_pass(error) else UserError
            raise kind(f"data = {self.name!r}: cannot read the stream: {reason(error)}") from error


def _digest(text: str) -> int:
    """64 bits by which a text is known again."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _open(spec: str, text_key: str) -> tuple[Any, Callable[[Any], str]]:
    """The stream, and what takes the text from a record; torchtitan's own datasets keep their own."""
    from datasets import Dataset, config, load_dataset
    from torchtitan.hf_datasets.text_datasets import DATASETS

    name = StreamName.parse(spec)
    try:
        if name.name in DATASETS and name == StreamName(name.name):
            known = DATASETS[name.name]
            stream, take = known.loader(known.path), known.sample_processor
        else:
            stream = load_dataset(name.name, name.config, split=name.split, streaming=True)
            take = _taker(spec, text_key)
        return (stream.to_iterable_dataset() if isinstance(stream, Dataset) else stream), take
    except Exception as error:  # as above
        # A machine that is told to stay off the network will not find it after a restart either.
        kind = ReadError if may_pass(error) and not config.HF_HUB_OFFLINE else UserError
        raise kind(f"data = {spec!r}: cannot open the dataset: {reason(error)}") from error


def _taker(spec: str, text_key: str) -> Callable[[Any], str]:
    def take(record: Any) -> str:
        if text_key not in record:
            raise UserError(f"data = {spec!r}: no column {text_key!r} (text_key); its columns are {sorted(record)}")
        text = record[text_key]
        if text is not None and not isinstance(text, str):
            raise BadRecord(f"data = {spec!r}: {text_key!r} (text_key) holds a {type(text).__name__}, not text")
        return text or ""

    return take
