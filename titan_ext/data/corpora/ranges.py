"""Documents that are byte ranges: text files or pieces of large ones, lines of JSONL, objects of JSON, cells of CSV.

Only the ranges are held, never the text, so any document can be read at any time at the cost of a
seek, and a corpus can be truly permuted.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from titan_ext.data.corpora.files import CorpusFile, Format
from titan_ext.data.corpora.records import scan_json, text_of_record
from titan_ext.data.corpora.signature import decode, encoding_of
from titan_ext.data.corpora.unpacked import Bytes, Copies, Stamp, copies, stamp
from titan_ext.error_text import changed, unreadable
from titan_ext.errors import BadRecord

PIECE_BYTES = 1 << 20
"""A text above this is cut at line ends into documents of about this size (bytes), so that one large
file can be shared out and need not be held, and no tokenizer is given more at a time."""

_UNCUT_BYTES = PIECE_BYTES + PIECE_BYTES // 2
_BLOCK_BYTES = 1 << 24
_SHORTEST_JSON = 2
_MARK_BYTES = 4
_TRIED_RECORDS = 100

_Read = Callable[[int, int], bytes]
"""Gives the bytes from one place to another."""


def pieces(text: str) -> Iterator[str]:
    """A document as it is; one that is larger than an uncut text file, cut as such a file is."""
    raw = text.encode("utf-8", "replace") if 4 * len(text) > _UNCUT_BYTES else b""
    if len(raw) <= _UNCUT_BYTES:
        yield text
        return
    for start, stop in _scan_text(lambda start, stop: raw[start:stop], 0, len(raw)):
        yield raw[start:stop].decode()


class ByteRanges:
    """The documents of files that are no tables of Arrow's, numbered in the order of the files.

    Args:
        files: Files of format "text", "lines", "json" or "csv".
        text_key: The key of a JSON object, or column of CSV, that holds its text.
        tolerant: Whether single documents that cannot be used are left out later; a file is then refused only where
            its first hundred are all such.
        remember: Whether the same files may be opened again soon, and then not looked through again.

    Raises:
        UserError: a file cannot be read, or its first document is not a JSON object with that key.
        RunError: there is no room to unpack a file.
    """

    def __init__(
        self, files: Sequence[CorpusFile], text_key: str, tolerant: bool = False, remember: bool = True
    ) -> None:
        self._files = list(files)
        self._scan_path = _scan_path if remember else _scan_path.__wrapped__
        self._copies_of = copies if remember else copies.__wrapped__
        self._text_key = text_key
        self._tolerant = tolerant
        self._stamps = [_stamp(file.path) for file in self._files]
        packed = [n for n, file in enumerate(self._files) if _needs_copy(file, self._stamps[n][0])]
        self._copied = {number: place for place, number in enumerate(packed)}
        self._held: Copies | None = None
        ranges = [self._index(number) for number in range(len(self._files))]
        counts = [len(found) for found in ranges]
        self._ranges = np.concatenate(ranges) if ranges else np.empty((0, 2), np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._check_first_records()

    def __len__(self) -> int:
        return len(self._ranges)

    @property
    def size(self) -> int:
        """Bytes of the documents as stored (decompressed; a JSON line counts whole)."""
        return int((self._ranges[:, 1] - self._ranges[:, 0]).sum())

    def files(self) -> list[tuple[Path, int]]:
        """The files, and the bytes of each."""
        return [(file.path, size) for file, (size, _) in zip(self._files, self._stamps, strict=True)]

    @property
    def sources(self) -> list[str]:
        """Paths of the files."""
        return [str(file.path) for file in self._files]

    def source(self, index: int) -> int:
        """Number of the file that holds document ``index``."""
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def source_numbers(self) -> np.ndarray:
        """``source`` of every document, ``[documents]`` int64."""
        return np.repeat(np.arange(len(self._files)), np.diff(self._first))

    @property
    def empty(self) -> int:
        """Files without a document."""
        return int((np.diff(self._first) == 0).sum())

    @property
    def problems(self) -> list[str]:
        """What is wrong with each document that was left out when the files were indexed."""
        return self._copies.problems if self._copied else []

    def layout(self) -> np.ndarray:
        """Bytes of each document, ``[documents]`` int64: part of what a corpus is known by."""
        return self._ranges[:, 1] - self._ranges[:, 0]

    def units(self) -> np.ndarray | None:
        """None: reading one document costs the same wherever it lies."""
        return None

    def read(self, index: int) -> str:
        """Text of document ``index``; empty where there is none.

        Raises:
            BadRecord: it is not text, or not JSON, lacks the key, or holds no string there.
            UserError: its file has changed or cannot be read.
            ReadError: it cannot be read at the moment.
        """
        number = self.source(index)
        file, (start, stop) = self._files[number], self._ranges[index].tolist()
        raw = self._bytes(number, start, stop)
        where = f"data: {str(file.path)!r}, document {index - int(self._first[number]) + 1}"
        if file.format in ("lines", "json"):
            return text_of_record(raw, self._text_key, where)
        try:
            return decode(raw, start) if file.format == "text" else raw.decode()
        except ValueError as error:
            raise BadRecord(f"data: {str(file.path)!r}: {error}") from None

    def _bytes(self, number: int, start: int, stop: int) -> bytes:
        if number in self._copied:
            return self._copies.read(start, stop)
        path = self._files[number].path
        try:
            with open(path, "rb") as file:
                if stamp(os.fstat(file.fileno())) != self._stamps[number]:
                    raise changed(path)
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise unreadable(path, error) from error

    @property
    def _copies(self) -> Copies:
        if self._held is None:
            files = tuple(self._files[number] for number in self._copied)
            stamps = tuple(self._stamps[number] for number in self._copied)
            self._held = self._copies_of(files, stamps, self._text_key, self._tolerant)
        return self._held

    def _index(self, number: int) -> np.ndarray:
        file = self._files[number]
        if number not in self._copied:
            try:
                return self._scan_path(file.path, file.format, self._stamps[number])
            except OSError as error:
                raise unreadable(file.path, error) from error
        place = self._copied[number]
        rows = self._copies.rows[place]
        return _scan(self._copies, file.format, file.path, *self._copies.regions[place]) if rows is None else rows

    def _check_first_records(self) -> None:
        for number, file in enumerate(self._files):
            first, stop = self._first[number : number + 2].tolist()
            if file.format in ("lines", "json"):
                self._check_some(first, min(stop, first + (_TRIED_RECORDS if self._tolerant else 1)))

    def _check_some(self, first: int, stop: int) -> None:
        """Raises what is wrong with the first document, if nothing is right up to ``stop``."""
        problem = None
        for index in range(first, stop):
            try:
                self.read(index)
                return
            except BadRecord as error:
                problem = problem or error
        if problem:
            raise problem

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}


def _needs_copy(file: CorpusFile, size: int) -> bool:
    """Whether a file cannot be read from the middle, or holds texts within cells."""
    if file.compression or file.format == "csv":
        return True
    if file.format == "text" and size <= _UNCUT_BYTES:
        return False
    try:
        with open(file.path, "rb") as opened:
            return encoding_of(opened.read(_MARK_BYTES)) != "utf-8"
    except OSError as error:
        raise unreadable(file.path, error) from error


def _stamp(path: Path) -> Stamp:
    try:
        return stamp(path.stat())
    except OSError as error:
        raise unreadable(path, error) from error


@lru_cache(maxsize=256)
def _scan_path(path: Path, format: Format, state: Stamp) -> np.ndarray:
    # A loader that is built anew for every validation finds the index again, and a changed file is scanned again.
    size, _ = state
    if format == "text" and size <= _UNCUT_BYTES:
        return np.array([(0, size)] if size else [], np.int64).reshape(-1, 2)
    with open(path, "rb") as file:
        return _scan(Bytes(file), format, path, 0, size)


def _scan(source: Bytes, format: Format, path: Path, begin: int, end: int) -> np.ndarray:
    """Byte ranges ``[documents, 2]`` (int64) of the documents between two places of a file."""
    if format == "lines":
        return _scan_lines(source.read, begin, end)
    if format == "json":
        return scan_json(source.view(begin, end), path) + begin
    return _scan_text(source.read, begin, end)


def _scan_lines(read: _Read, begin: int, end: int) -> np.ndarray:
    ends = []
    for position in range(begin, end, _BLOCK_BYTES):
        block = read(position, min(position + _BLOCK_BYTES, end))
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
    stops = np.concatenate([*ends, [end]]).astype(np.int64)
    starts = np.concatenate([[begin], stops[:-1] + 1])
    return np.stack([starts, stops], axis=1)[stops - starts >= _SHORTEST_JSON]


def _scan_text(read: _Read, begin: int, end: int) -> np.ndarray:
    cuts = [begin]
    while end - cuts[-1] > _UNCUT_BYTES:
        cuts.append(_cut_after(read, cuts[-1] + PIECE_BYTES))
    cuts.append(end)
    return np.array([pair for pair in pairwise(cuts) if pair[0] < pair[1]], np.int64).reshape(-1, 2)


def _cut_after(read: _Read, position: int) -> int:
    """The next line's start, or where there are no lines the next character's."""
    block = read(position, position + PIECE_BYTES // 4)
    newline = block.find(b"\n")
    if newline >= 0:
        return position + newline + 1
    continuation = 0
    while continuation < len(block) and block[continuation] & 0xC0 == 0x80:
        continuation += 1
    return position + continuation
