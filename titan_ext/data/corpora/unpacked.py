"""Files of a corpus in UTF-8, at any place: as they are, or as a copy that is unpacked, decoded or taken from a table.

What is compressed, or in UTF-16, cannot be read from the middle.
"""

import bz2
import codecs
import gzip
import lzma
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from titan_ext.data.corpora.files import CorpusFile
from titan_ext.data.corpora.signature import encoding_of
from titan_ext.error_text import reason, unreadable
from titan_ext.errors import RunError, UserError

_BLOCK_BYTES = 1 << 24

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds: what shows that a file is another."""


def stamp(status: os.stat_result) -> Stamp:
    """The stamp in what ``os.stat`` says."""
    return status.st_size, status.st_mtime_ns


class Bytes:
    """An open file, read by places: forked loader workers share a position."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``."""
        parts = []
        # One call gives 2 GiB at most.
        while start < stop and (part := os.pread(self._file.fileno(), stop - start, start)):
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def view(self, start: int, stop: int) -> memoryview:
        """The same bytes without reading them."""
        if start == stop:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))[start:stop]


class Copies(Bytes):
    """Copies of files, one behind the other in a temporary file that no folder shows.

    Args:
        files: which.
        text_key: column of the text in files of CSV.
        tolerant: whether broken rows of CSV are left out.

    Raises:
        UserError: a file is not what its name says, or is cut short.
        RunError: there is no room for the copy.
    """

    def __init__(self, files: tuple[CorpusFile, ...], text_key: str, tolerant: bool) -> None:
        super().__init__(tempfile.TemporaryFile(prefix="titan_ext_", buffering=0))
        self._end = 0
        self.regions: list[tuple[int, int]] = []
        """Where each file's copy begins and ends; for CSV, the copy of its texts."""
        self.rows: list[np.ndarray | None] = []
        """Byte ranges ``[rows, 2]`` of the texts of a file of CSV; None for other formats."""
        self.problems: list[str] = []
        """What is wrong with each row of CSV that is left out."""
        for file in files:
            if file.format == "csv":
                self._add_table(file, text_key, self.problems if tolerant else None)
            else:
                self.regions.append(self._add(blocks(file), file))
                self.rows.append(None)

    def _add(self, parts: Iterator[bytes | memoryview], file: CorpusFile) -> tuple[int, int]:
        start = self._end
        for part in parts:
            self._write(part, file)
        return start, self._end

    def _add_table(self, file: CorpusFile, text_key: str, problems: list[str] | None) -> None:
        from titan_ext.data.corpora.csv_rows import csv_texts

        begin, stop = self._add(blocks(file), file)
        rows, start = [np.empty((0, 2), np.int64)], self._end
        for data, offsets in csv_texts(self.view(begin, stop), file, text_key, problems):
            rows.append(np.stack([offsets[:-1], offsets[1:]], axis=1) + self._end)
            self._write(data, file)
        self.regions.append((start, self._end))
        self.rows.append(np.concatenate(rows))

    def _write(self, data: bytes | memoryview, file: CorpusFile) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise RunError(
                f"data: no room in {tempfile.gettempdir()!r} for an unpacked copy of {str(file.path)!r}: "
                f"{error.strerror}; name another folder with TMPDIR, or read the corpus as a stream: data = 'hf:FOLDER'"
            ) from error
        self._end += len(memoryview(data))


@lru_cache(maxsize=4)
def copies(files: tuple[CorpusFile, ...], stamps: tuple[Stamp, ...], text_key: str, tolerant: bool) -> Copies:
    """``Copies``, which a loader that is built anew for every validation finds again while no file has changed."""
    del stamps
    return Copies(files, text_key, tolerant)


def blocks(file: CorpusFile) -> Iterator[bytes]:
    """The content of a file, unpacked and in UTF-8, in blocks.

    Raises:
        UserError: it cannot be unpacked or decoded.
    """
    failures = (OSError, EOFError, zlib.error, lzma.LZMAError)
    try:
        with _opened(file) as packed:
            yield from _decoded(iter(lambda: packed.read(_BLOCK_BYTES), b""), file.path)
    except failures as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file.path, error) from error
        raise UserError(f"data: cannot decompress {str(file.path)!r}: {reason(error)}") from error


def _opened(file: CorpusFile) -> BinaryIO:
    if file.compression == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(file.path)), "zstd")
    opener: Any = {"": open, "gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[file.compression]
    return opener(file.path, "rb")


def _decoded(parts: Iterator[bytes], path: Path) -> Iterator[bytes]:
    first = next(parts, b"")
    encoding = encoding_of(first)
    if encoding == "utf-8":
        yield first
        yield from parts
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        yield decoder.decode(first).encode()
        for part in parts:
            yield decoder.decode(part).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise UserError(
            f"data: {str(path)!r}: not {encoding.upper()} text, though its mark says so: {reason(error)}"
        ) from None
