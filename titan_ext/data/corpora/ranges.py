"""Documents that are byte ranges of files: whole text files, pieces of large ones, lines of JSONL.

Only the ranges are held, never the text, so any document can be read at any time at the cost of a
seek, and a corpus can be truly permuted.
"""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from titan_ext.data.corpora.files import CorpusFile
from titan_ext.errors import UserError

PIECE_BYTES = 1 << 20
"""A text file above this is cut at line ends into documents of about this size (bytes), so that one
large file can be shared out and need not be held."""

_UNCUT_BYTES = PIECE_BYTES + PIECE_BYTES // 2
_BLOCK_BYTES = 1 << 24
_SHORTEST_JSON = 2


class GzipCopy:
    """A decompressed copy of a .gz file on disk, already unlinked: gzip itself cannot seek."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """The copy, made on first use.

        Raises:
            UserError: the file is not gzip, or cut short.
        """
        if self._file is None:
            copy = tempfile.TemporaryFile(prefix="titan_ext_")
            try:
                with gzip.open(self.path, "rb") as packed:
                    shutil.copyfileobj(packed, copy, _BLOCK_BYTES)
            except (OSError, EOFError) as error:
                raise UserError(f"data: cannot decompress {str(self.path)!r}: {error}") from error
            self._file = copy
        return self._file

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``; pread, since forked workers share one file position."""
        file = self.open()
        file.flush()
        return os.pread(file.fileno(), stop - start, start)

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])


class ByteRanges:
    """The documents of text and JSONL files, numbered in the order of the files.

    Args:
        files: Files of format "text" or "lines".
        text_key: The key of a JSON line that holds its text.

    Raises:
        UserError: a file cannot be read, or its first line is not a JSON object with that key.
    """

    def __init__(self, files: Sequence[CorpusFile], text_key: str) -> None:
        self._files = list(files)
        self._text_key = text_key
        self._copies = {i: GzipCopy(file.path) for i, file in enumerate(self._files) if file.gzipped}
        ranges = [self._index(i) for i in range(len(self._files))]
        counts = [len(found) for found in ranges]
        self._ranges = np.concatenate(ranges) if ranges else np.empty((0, 2), np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._check_first_lines()

    def __len__(self) -> int:
        return len(self._ranges)

    @property
    def size(self) -> int:
        """Bytes of the documents as stored (decompressed; a JSON line counts whole)."""
        return int((self._ranges[:, 1] - self._ranges[:, 0]).sum())

    def units(self) -> np.ndarray | None:
        """None: reading one document costs the same wherever it lies."""
        return None

    def read(self, index: int) -> str:
        """Text of document ``index``; empty where there is none.

        Raises:
            UserError: the line is not JSON, lacks the key, or holds no string there.
        """
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        start, stop = self._ranges[index]
        raw = self._bytes(number, int(start), int(stop))
        if self._files[number].format == "text":
            return raw.decode("utf-8", errors="replace").removeprefix("\ufeff")
        return _text_of_line(raw, self._text_key, self._files[number].path, index - int(self._first[number]))

    def _bytes(self, number: int, start: int, stop: int) -> bytes:
        if number in self._copies:
            return self._copies[number].read(start, stop)
        path = self._files[number].path
        try:
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise UserError(f"data: cannot read {str(path)!r}: {error.strerror}") from error

    def _index(self, number: int) -> np.ndarray:
        file = self._files[number]
        if number in self._copies:
            return _scan(self._copies[number].open(), file.format == "lines")
        try:
            status = file.path.stat()
            return _scan_path(file.path, file.format == "lines", status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise UserError(f"data: cannot read {str(file.path)!r}: {error.strerror}") from error

    def _check_first_lines(self) -> None:
        for number, file in enumerate(self._files):
            if file.format == "lines" and self._first[number] < self._first[number + 1]:
                self.read(int(self._first[number]))


@lru_cache(maxsize=256)
def _scan_path(path: Path, lines: bool, size: int, modified: int) -> np.ndarray:
    # Size and time are part of the key only: a loader that is built anew for every validation
    # finds the index again, and a changed file is scanned again.
    del modified
    if not lines and size <= _UNCUT_BYTES:
        return np.array([(0, size)] if size else [], np.int64).reshape(-1, 2)
    with open(path, "rb") as file:
        return _scan(file, lines)


def _scan(file: BinaryIO, lines: bool) -> np.ndarray:
    """Byte ranges ``[documents, 2]`` (int64) of the documents in a file."""
    return _scan_lines(file) if lines else _scan_text(file)


def _scan_lines(file: BinaryIO) -> np.ndarray:
    file.seek(0)
    ends, position = [], 0
    while block := file.read(_BLOCK_BYTES):
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
        position += len(block)
    stops = np.concatenate([*ends, [position]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    return np.stack([starts, stops], axis=1)[stops - starts >= _SHORTEST_JSON]


def _scan_text(file: BinaryIO) -> np.ndarray:
    size = file.seek(0, os.SEEK_END)
    cuts = [0]
    while size - cuts[-1] > _UNCUT_BYTES:
        cuts.append(_cut_after(file, cuts[-1] + PIECE_BYTES))
    cuts.append(size)
    return np.array([pair for pair in zip(cuts, cuts[1:]) if pair[0] < pair[1]], np.int64).reshape(-1, 2)


def _cut_after(file: BinaryIO, position: int) -> int:
    """The next line's start, or where there are no lines the next character's."""
    file.seek(position)
    block = file.read(PIECE_BYTES // 4)
    newline = block.find(b"\n")
    if newline >= 0:
        return position + newline + 1
    continuation = 0
    while continuation < len(block) and block[continuation] & 0xC0 == 0x80:
        continuation += 1
    return position + continuation


def _text_of_line(raw: bytes, key: str, path: Path, ordinal: int) -> str:
    where = f"data: {str(path)!r}, document {ordinal + 1}"
    if not raw.strip():
        return ""
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object is needed, got a {type(record).__name__}")
    if key not in record:
        raise UserError(f"{where}: no key {key!r} (text_key); its keys are {sorted(record)}")
    text = record[key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {key!r} (text_key) holds a {type(text).__name__}, not text")
    return _without_lone_surrogates(text or "")


def _without_lone_surrogates(text: str) -> str:
    """JSON can escape half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
