"""Following a file of JSON lines that another process writes."""

import json
from pathlib import Path
from typing import Any


class JsonLinesFollower:
    """Yields the complete lines appended to a file since it was last asked.

    What is in the file at the start belongs to an earlier run and is passed over. A file that is
    replaced or cut is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity, self._offset = self._look()

    def poll(self) -> list[dict[str, Any]]:
        """The new lines, oldest first; a line without its end waits for the next call, one that is not JSON is dropped."""
        identity, size = self._look()
        if identity != self._identity or size < self._offset:
            self._identity, self._offset = identity, 0
        if size == self._offset:
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            complete, end, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(end)
        records = [_parse(line) for line in complete.splitlines()]
        return [record for record in records if isinstance(record, dict)]

    def _look(self) -> tuple[int | None, int]:
        """Inode and size in bytes; (None, 0) where there is no file."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None, 0
        return found.st_ino, found.st_size


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
