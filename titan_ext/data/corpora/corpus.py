"""A local corpus: a numbered set of documents, any of which can be read."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Protocol

import numpy as np

from titan_ext.data.corpora.builtin import Prose, library_sources
from titan_ext.data.corpora.files import CorpusFile, find_files
from titan_ext.data.corpora.parquet import ParquetRows
from titan_ext.data.corpora.ranges import ByteRanges
from titan_ext.errors import UserError

BUILTINS = ("builtin:code", "builtin:docs")


class Documents(Protocol):
    """Numbered documents of one kind."""

    @property
    def size(self) -> int:
        """Bytes of all documents as stored."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> str:
        """Text of document ``index``."""

    def units(self) -> np.ndarray | None:
        """A number per document, equal for those that are cheap to read together; None: all differ."""


class Corpus:
    """Documents of several kinds under one numbering.

    Args:
        name: What the user called it, for messages.
        parts: The kinds, in order.

    Raises:
        UserError: there is no document at all.
    """

    def __init__(self, name: str, parts: Sequence[Documents]) -> None:
        self.name = name
        self._parts = [part for part in parts if len(part)]
        self._first = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])]).astype(np.int64)
        if not self._parts:
            raise UserError(f"data = {name!r}: no documents; every file is empty")

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def size(self) -> int:
        """Bytes of all documents as stored."""
        return sum(part.size for part in self._parts)

    def read(self, index: int) -> str:
        """Text of document ``index``; empty where a document holds none.

        Raises:
            UserError: the document is not what its format promises.
        """
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._parts[part].read(index - int(self._first[part]))

    def units(self) -> np.ndarray | None:
        """A number per document, ``[documents]`` int64, equal for those cheap to read together; None: all differ."""
        given = [part.units() for part in self._parts]
        if all(units is None for units in given):
            return None
        found, base = [], 0
        for part, units in zip(self._parts, given):
            units = np.arange(len(part)) if units is None else units
            found.append(units + base)
            base += int(units[-1]) + 1
        return np.concatenate(found)


def open_corpus(dataset: str, text_key: str = "text", keep: int = 2048) -> Corpus:
    """The corpus that ``dataset`` names: a file, a folder, a glob, or a built-in.

    Args:
        dataset: The name, as a site's ``data`` gives it.
        text_key: Key of a JSON line, or column of a Parquet file, that holds the text.
        keep: Parquet rows kept after they were read.

    Raises:
        UserError: nothing of that name, of no known format, unreadable or empty.
    """
    if not dataset:
        raise UserError(f"data is missing: give a file, a folder, a glob, 'hf:NAME', or one of {list(BUILTINS)}")
    if dataset.startswith("builtin:"):
        return Corpus(dataset, [_builtin(dataset, text_key)])
    files = find_files(dataset)
    return Corpus(dataset, _parts(files, text_key, keep))


def _builtin(dataset: str, text_key: str) -> Documents:
    if dataset == "builtin:code":
        return ByteRanges(library_sources(), text_key)
    if dataset == "builtin:docs":
        return Prose()
    close = get_close_matches(dataset, BUILTINS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"data = {dataset!r}: no such built-in corpus; allowed: {list(BUILTINS)}{hint}")


def _parts(files: Sequence[CorpusFile], text_key: str, keep: int) -> list[Documents]:
    ranged = [file for file in files if file.format != "parquet"]
    tables = [file.path for file in files if file.format == "parquet"]
    return [ByteRanges(ranged, text_key), ParquetRows(tables, text_key, keep)]
