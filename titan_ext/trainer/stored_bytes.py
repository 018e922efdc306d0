"""Whether a checkpoint's files hold the bytes that were written: torch writes their checksums, and does not look at them."""

import os
import zipfile
import zlib
from typing import BinaryIO

from torch.distributed.checkpoint import FileSystemReader


def broken_part(checkpoint: str, share: int, shares: int) -> str | None:
    """The first file of a checkpoint in torch's distributed format whose bytes are not those that were written.

    Reads a part of the checkpoint: all ``shares`` together read all of it, one time.

    Args:
        checkpoint: its folder; whose files have their sizes.
        share: which part, from 0.
        shares: how many there are.

    Returns:
        the file and what is wrong with it, None if nothing is.
    """
    stored = sorted(
        {
            (part.relative_path, part.offset, part.length)
            for part in FileSystemReader(checkpoint).read_metadata().storage_data.values()
            if not part.transform_descriptors  # compressed by an extension, which knows best
        }
    )
    for name, offset, length in stored[share::shares]:
        with open(os.path.join(checkpoint, name), "rb") as file:
            if not _is_sound(_Window(file, offset, length)):
                return f"{name} is damaged (checksum, at byte {offset})"
    return None


def _is_sound(window: "_Window") -> bool:
    try:
        with zipfile.ZipFile(window) as archive:  # type: ignore[type-var]
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, OverflowError):
        return False


class _Window:
    """A stretch of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        self._file.seek(self._start + max(0, base + offset))
        return self.tell()

    def tell(self) -> int:
        return self._file.tell() - self._start

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._length - self.tell())
        return self._file.read(left if count is None or count < 0 else min(count, left))

    def seekable(self) -> bool:
        return True
