"""Text files whose content and lines are whole, where a disk may fill and a process may end at any moment."""

import errno
import os
import shutil
from io import FileIO
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; what is there stays until the new one is complete.

    Args:
        path: the file; its folder must exist. A link stays, and what it leads to is replaced.
        text: its whole content, written as UTF-8.

    Raises:
        OSError: it cannot be written; ``filename`` is ``path``.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a terminal or a pipe
        else:
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def append_line(path: str | os.PathLike[str], line: str, *, sync: bool = False) -> None:
    """Add a line to a file, which is made with its folder where it is missing.

    Args:
        path: the file.
        line: without its end.
        sync: whether it is on the disk when this returns, and not with the system alone.

    Raises:
        OSError: it is not added, or in part, which does not harm the next one; ``filename`` is ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        data = f"{line}\n".encode()
        if not _ends_whole(file):
            data = b"\n" + data
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)
            raise


def is_full(folder: str | os.PathLike[str]) -> bool:
    """Whether less than a MiB is free where a folder lies; False where that is not known."""
    try:
        return shutil.disk_usage(folder).free < 2**20
    except OSError:
        return False


def _ends_whole(file: FileIO) -> bool:
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
