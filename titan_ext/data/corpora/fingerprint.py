"""By what a corpus is known again: a resumed run must read on in the very text that it has begun."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from titan_ext.error_text import unreadable

_WHOLE_BYTES = 1 << 24
"""A corpus up to this is read whole; of a larger one, as much in all, in windows."""
_WINDOW_BYTES = 1 << 16
_DIGEST_BYTES = 16


class Known(Protocol):
    """Documents that can be told from others."""

    def files(self) -> Sequence[tuple[Path, int]]:
        """The files that hold them, and the bytes of each."""

    def layout(self) -> np.ndarray:
        """Numbers that follow from all documents, such as the length of each."""


def fingerprint_of(parts: Iterable[Known]) -> str:
    """32 hexadecimal digits that change with the documents or with their order, not with where they lie.

    Every length counts, and of the bytes 16 MiB, evenly spread; a small corpus counts whole.

    Raises:
        UserError: a file cannot be read.
    """
    known = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        known.update(np.ascontiguousarray(part.layout()).tobytes())
        known.update(digest_of_files(part.files()))
    return known.hexdigest()


def digest_of_files(files: Sequence[tuple[Path, int]]) -> bytes:
    """16 bytes that follow from the sizes of files and what they hold at places evenly spread over all of them.

    Args:
        files: each with its bytes; an empty one counts for nothing.
    """
    paths = [path for path, size in files if size]
    sizes = np.array([size for _, size in files if size], np.int64)
    found = hashlib.blake2b(sizes.tobytes(), digest_size=_DIGEST_BYTES)
    first = np.concatenate([[0], np.cumsum(sizes)])
    for start, stop in _windows(int(first[-1])):
        number = int(np.searchsorted(first, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(first[number + 1]))
            found.update(_read(paths[number], start - int(first[number]), end - start))
            start, number = end, number + 1
    return found.digest()


def _windows(total: int) -> Iterable[tuple[int, int]]:
    if total <= _WHOLE_BYTES:
        return [(0, total)]
    starts = np.linspace(0, total - _WINDOW_BYTES, _WHOLE_BYTES // _WINDOW_BYTES).astype(np.int64).tolist()
    return [(start, start + _WINDOW_BYTES) for start in starts]


def _read(path: Path, start: int, count: int) -> bytes:
    if not count:
        return b""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from error
