"""Follows files of JSON lines that another process appends to, here or behind a server."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a file."""

    identity: str
    """Another one means another file under the same name."""
    start: int
    """Offset of the first byte: 0 where the file is another than the one asked for, or has become shorter."""
    data: bytes


class Source(Protocol):
    """A file that grows, wherever it is."""

    def read(self, identity: str | None, start: int) -> Chunk | None:
        """What lies behind ``start`` in the file of that identity, at most some MiB; None where there is no file.

        Raises:
            OSError: it cannot be read at the moment.
        """


class LocalFile:
    """A file of this machine.

    Args:
        path: it may appear later, or be replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, identity: str | None, start: int) -> Chunk | None:
        """As ``Source.read``."""
        try:
            with open(self.path, "rb") as file:
                found = self.path.stat()
                own = f"{found.st_dev:x}-{found.st_ino:x}"
                if own != identity or found.st_size < start:
                    start = 0
                file.seek(start)
                return Chunk(own, start, file.read(_CHUNK_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def end(self) -> tuple[str | None, int]:
        """Identity and size in bytes; (None, 0) where there is no file."""
        try:
            found = self.path.stat()
        except OSError:
            return None, 0
        return f"{found.st_dev:x}-{found.st_ino:x}", found.st_size


class LineFollower:
    """Returns the complete lines that were appended to a file since the last call, its first ones at first.

    A file that is replaced or cut is read from its beginning.

    Args:
        source: the file.
        identity: of the file that has been read already, up to ``start``.
        start: offset of the first byte to read.
    """

    def __init__(self, source: Source, identity: str | None = None, start: int = 0) -> None:
        self._source = source
        self._identity = identity
        self._offset = start
        self.begun_anew = False
        """Whether the last ``poll`` found another file than the one before, or one that was cut."""

    def poll(self) -> list[dict[str, Any]]:
        """The new lines, oldest first; a line without its end waits for the next call, others than JSON are dropped.

        Raises:
            OSError: the file cannot be read at the moment.
        """
        self.begun_anew = False
        return [record for data in self._new() for record in _parsed(data)]

    def _new(self) -> Iterator[bytes]:
        while (chunk := self._source.read(self._identity, self._offset)) is not None:
            if chunk.start < self._offset:
                self.begun_anew = True
            self._identity, self._offset = chunk.identity, chunk.start
            complete, end, _ = chunk.data.rpartition(b"\n")
            if not end:
                return
            self._offset += len(complete) + 1
            yield complete
            if len(chunk.data) < _CHUNK_BYTES:
                return


def read_table(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None for what is none. NaN and the infinities, which JSON does not have, count as null, as sites
    write them."""
    try:
        found = json.loads(text, parse_constant=lambda _: None)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def number(value: Any) -> float | None:
    """The value, if it is a number."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _parsed(lines: bytes) -> Iterator[dict[str, Any]]:
    # A process that was killed may have half written one.
    return (record for line in lines.splitlines() if (record := read_table(line)) is not None)
