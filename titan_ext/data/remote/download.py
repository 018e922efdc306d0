"""One remote file as a file of this machine."""

from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from titan_ext.data.remote.files import RemoteFile, as_data, is_web, version_of
from titan_ext.error_text import changed
from titan_ext.errors import RunError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_RANGE_BYTES = 4 << 20
_RANGES_TOGETHER = 4
_BLOCK_BYTES = 1 << 20


class NoRoom(RunError):
    """The disk cannot take a file."""


class _NoRanges(RunError):
    """A web server gives whole files only."""


def download(file: RemoteFile, target: IO[bytes], retry_seconds: float) -> None:
    """Write a remote file into an empty one. After a failure it goes on at the range that failed.

    A web server that knows no ranges gives the file from its beginning each time.

    Raises:
        UserError: it is another than was listed, is gone, or may not be read.
        ReadError: its server has been away for so long.
        NoRoom: the disk is full, or cannot be written.
    """
    in_ranges = file.size is not None
    while in_ranges and target.tell() < file.size:
        try:
            as_data(file.url, partial(_next_ranges, file, target), retry_seconds)
        except _NoRanges:
            in_ranges = False
    if not in_ranges:
        as_data(file.url, partial(_whole, file, target), retry_seconds)
    now = as_data(file.url, lambda files: files.info(file.url), retry_seconds)
    if (now.get("size"), version_of(now)) != (file.size, file.version):
        raise changed(file.url)


def write(data: bytes, target: IO[bytes], what: str) -> None:
    """Write what is read of a remote file.

    Raises:
        NoRoom: the disk is full, or cannot be written.
    """
    try:
        target.write(data)
        target.flush()
    except OSError as error:
        raise NoRoom(
            f"data: no room in {str(Path(target.name).parent)!r} for a copy of {what!r}: {error.strerror}; name another "
            "folder with data.cache_folder"
        ) from error


def _next_ranges(file: RemoteFile, target: IO[bytes], files: "AbstractFileSystem") -> None:
    first = target.tell()
    starts = list(range(first, min(file.size, first + _RANGES_TOGETHER * _RANGE_BYTES), _RANGE_BYTES))
    stops = [min(start + _RANGE_BYTES, file.size) for start in starts]
    if is_web(file.url):
        parts = [_of_web(file, files, start, stop) for start, stop in zip(starts, stops, strict=True)]
    else:
        parts = files.cat_ranges([file.url] * len(starts), starts, stops)
    for part, start, stop in zip(parts, starts, stops, strict=True):
        if isinstance(part, Exception):
            raise part
        if len(part) != stop - start:
            raise ConnectionError(f"of the {stop - start:,} bytes from {start:,} on only {len(part):,} came")
        write(part, target, file.url)


def _of_web(file: RemoteFile, files: "AbstractFileSystem", start: int, stop: int) -> bytes:
    with files.open(file.url, "rb", cache_type="none", size=file.size) as source:
        try:
            source.seek(start)
            return source.read(stop - start)
        except ValueError as error:
            raise _NoRanges("") from error


def _whole(file: RemoteFile, target: IO[bytes], files: "AbstractFileSystem") -> None:
    target.seek(0)
    target.truncate()
    with files.open(file.url, "rb", block_size=0) as source:
        while block := source.read(_BLOCK_BYTES):
            write(block, target, file.url)
    if file.size is not None and target.tell() != file.size:
        raise ConnectionError(f"of {file.size:,} bytes only {target.tell():,} came")
