"""One run at a time in a site's folder: two would write over each other's checkpoints and between each other's lines."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_ext.errors import UserError

FILE_NAME = ".in_use"
# What a process of the run that is being restarted may take to be gone.
_PATIENCE_SECONDS = 20.0
_PAUSE_SECONDS = 0.2


@contextmanager
def in_use(folder: Path, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Keep a folder to this process for as long as the block lasts, or the process does.

    Args:
        folder: a site's, which exists.
        patience_seconds: how long another one may still have it.

    Raises:
        UserError: another process has it.
    """
    deadline = time.monotonic() + patience_seconds
    with open(folder / FILE_NAME, "a", encoding="utf-8") as file:
        while not _is_locked(file.fileno()):
            if time.monotonic() >= deadline:
                raise UserError(
                    f"dump_folder {str(folder.parent)!r}: another run trains in {folder} at this moment: end it, or take "
                    "another dump_folder"
                )
            time.sleep(_PAUSE_SECONDS)
        yield


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # the file system knows no locks
    return True
