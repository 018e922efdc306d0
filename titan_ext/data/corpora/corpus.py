"""A local corpus: a numbered set of documents, any of which can be read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from titan_ext.data.corpora.arrow import ArrowRows
from titan_ext.data.corpora.builtin import Prose, library_sources
from titan_ext.data.corpora.files import CorpusFile
from titan_ext.data.corpora.fingerprint import fingerprint_of
from titan_ext.data.corpora.listing import Listing, list_files
from titan_ext.data.corpora.parquet import ParquetRows
from titan_ext.data.corpora.ranges import ByteRanges
from titan_ext.data.order import Split
from titan_ext.errors import UserError, nearest

BUILTIN = "builtin:"
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

    def files(self) -> Sequence[tuple[Path, int]]:
        """The files that hold them, and the bytes of each."""

    @property
    def sources(self) -> Sequence[str]:
        """Names of what the documents come from: the files."""

    def source(self, index: int) -> int:
        """Number among ``sources`` of what document ``index`` comes from."""

    def source_numbers(self) -> np.ndarray:
        """``source`` of every document, ``[documents]`` int64."""

    def layout(self) -> np.ndarray:
        """Numbers that follow from all documents, such as the length of each."""


class Corpus:
    """Documents of several kinds under one numbering.

    Args:
        name: What the user called it, for messages.
        parts: The kinds, in order.
        listing: What was read of what is there.
        text_key: Key or column of the texts; None where all documents are texts as a whole.

    Raises:
        UserError: there is no document at all.
    """

    def __init__(
        self, name: str, parts: Sequence[Documents], listing: Listing | None = None, text_key: str | None = None
    ) -> None:
        self.name = name
        self.text_key = text_key
        self.listing = listing or Listing(name)
        self._all, self._parts = list(parts), [part for part in parts if len(part)]
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
        part = self._part(index)
        return self._parts[part].read(index - int(self._first[part]))

    def source(self, index: int) -> int:
        """Number among ``sources`` of what document ``index`` comes from."""
        part = self._part(index)
        before = sum(len(each.sources) for each in self._parts[:part])
        return before + self._parts[part].source(index - int(self._first[part]))

    def source_numbers(self) -> np.ndarray:
        """``source`` of every document, ascending, ``[documents]`` int64."""
        before = np.cumsum([0] + [len(part.sources) for part in self._parts])
        return np.concatenate([part.source_numbers() + first for part, first in zip(self._parts, before, strict=False)])

    @property
    def sources(self) -> list[str]:
        """Names of what the documents come from: the files."""
        return [name for part in self._parts for name in part.sources]

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    @property
    def empty(self) -> int:
        """Files without a document."""
        return sum(getattr(part, "empty", 0) for part in self._all)

    @property
    def problems(self) -> list[str]:
        """What is wrong with each document that was left out before the others were numbered."""
        return [problem for part in self._all for problem in getattr(part, "problems", ())]

    def fingerprint(self) -> str:
        """32 hexadecimal digits by which these documents in this order are known again."""
        return fingerprint_of(self._parts)

    def units(self) -> np.ndarray | None:
        """A number per document, ``[documents]`` int64, equal for those cheap to read together; None: all differ."""
        given = [part.units() for part in self._parts]
        if all(units is None for units in given):
            return None
        found, base = [], 0
        for part, units in zip(self._parts, given, strict=True):
            units = np.arange(len(part)) if units is None else units
            found.append(units + base)
            base += int(units[-1]) + 1
        return np.concatenate(found)


def open_corpus(
    dataset: str,
    text_key: str = "text",
    keep: int = 2048,
    split: Split = "auto",
    holdout_fraction: float = 0.0,
    tolerant: bool = False,
) -> Corpus:
    """The corpus that ``dataset`` names: a file, a folder, a glob, or a built-in.

    Args:
        dataset: The name, as a site's ``data`` gives it.
        text_key: Key of a JSON object, or column of a table, that holds the text.
        keep: Rows of a table kept after they were read.
        split: Which files to take where their names say of which split they are.
        holdout_fraction: As in the loader's config.
        tolerant: Whether single documents that cannot be used are left out later.

    Raises:
        UserError: nothing of that name, of no known format, unreadable or empty.
        RunError: there is no room to unpack it.
    """
    listing = list_corpus(dataset, text_key, split, holdout_fraction, tolerant)
    if dataset == "builtin:docs":
        return Corpus(dataset, [Prose()], listing)
    keyed = any(file.format != "text" for file in listing.files)
    return Corpus(dataset, parts_of(listing.files, text_key, keep, tolerant), listing, text_key if keyed else None)


def list_corpus(
    dataset: str,
    text_key: str = "text",
    split: Split = "auto",
    holdout_fraction: float = 0.0,
    tolerant: bool = False,
    retry_seconds: float = 0.0,
) -> Listing:
    """What ``open_corpus`` of the same arguments would read, or what of a URL is read, without reading it.

    Raises:
        UserError: as ``open_corpus``, as far as names, places and the beginnings of files show.
    """
    if not dataset:
        raise UserError(f"data is missing: give a file, a folder, a glob, 'hf:NAME', or one of {list(BUILTINS)}")
    if dataset.startswith(BUILTIN):
        return _builtin(dataset)
    return list_files(
        dataset,
        text_key=text_key,
        split=split,
        holdout_fraction=holdout_fraction,
        tolerant=tolerant,
        retry_seconds=retry_seconds,
    )


def _builtin(dataset: str) -> Listing:
    if dataset == "builtin:code":
        return Listing(dataset, library_sources())
    if dataset == "builtin:docs":
        return Listing(dataset, notes=["what is written about Python and the installed packages"])
    close = nearest(dataset, BUILTINS)
    hint = f"; did you mean {close!r}?" if close else ""
    raise UserError(f"data = {dataset!r}: no such built-in corpus; allowed: {list(BUILTINS)}{hint}")


def parts_of(
    files: Sequence[CorpusFile], text_key: str, keep: int, tolerant: bool, remember: bool = True
) -> list[Documents]:
    """The documents of local files, by kind.

    Args:
        files: which.
        text_key: as in ``open_corpus``, whose errors these are.
        keep: as there.
        tolerant: as there.
        remember: as in ``ByteRanges``.
    """
    tables = {kind: [file.path for file in files if file.format == kind] for kind in ("parquet", "arrow")}
    ranged = [file for file in files if file.format not in tables]
    return [
        ByteRanges(ranged, text_key, tolerant, remember),
        ParquetRows(tables["parquet"], text_key, keep),
        ArrowRows(tables["arrow"], text_key, keep),
    ]
