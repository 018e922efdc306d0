"""The log of one process: its standard output and error, attempt after attempt."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from titan_ext.error_text import unwritable
from titan_ext.errors import UserError

ERROR_PREFIX = "titan-ext: error:"
"""Begins the one line that says why a process failed."""
_TAIL_BYTES = 64 * 1024


class ProcessLog:
    """A file that collects the output of a process, and what it says about a failure.

    Args:
        path: the file; appended to.

    Raises:
        UserError: processes of another launch still write to it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)
        except OSError as error:
            raise unwritable(str(path), error) from None
        self._lock()
        self._begin = 0

    def fileno(self) -> int:
        """The descriptor for a process to write to."""
        return self._file.fileno()

    def begin(self, title: str) -> None:
        """Mark the start of an attempt; ``tail`` and ``error_line`` read what follows."""
        with contextlib.suppress(OSError):  # a full disk must not end the launcher, which tells of it
            self._file.write(f"--- {title}, {time.strftime('%Y-%m-%d %H:%M:%S')} ---\n".encode())
        self._begin = os.fstat(self.fileno()).st_size

    def tail(self, lines: int = 25, rank: int | None = None) -> list[str]:
        """The last lines of this attempt, blank ones left out; only those of a rank's traceback where one is named."""
        start = "" if rank is None else f"[rank{rank}]:"  # as torch begins them
        return [line for line in self._text().splitlines() if line.strip() and line.startswith(start)][-lines:]

    def error_line(self) -> str | None:
        """The line with which the attempt's program said what is wrong, if it did."""
        found = [line for line in self._text().splitlines() if line.startswith(ERROR_PREFIX)]
        return found[-1] if found else None

    def close(self) -> None:
        """Close the file; processes that write to it are not affected."""
        self._file.close()

    def _text(self) -> str:
        with open(self.path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, end - _TAIL_BYTES))
            return file.read().decode(errors="replace")

    def _lock(self) -> None:
        # The lock goes with the open file, which every process of the site inherits: it is free again
        # when the last of them has ended, even if the launcher was killed.
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is in use by another launch: let it end, or choose another --dump_folder"
            ) from None
        except OSError:
            pass  # a file system without locks
