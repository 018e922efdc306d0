"""What another library's error says, in one line, and whether trying again can help."""

import errno
import os

from titan_ext.errors import ReadError, RunError, UserError

# What a restart does not change; any other failure to read may pass.
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
# What is wrong with a path that the user chose, whatever was to be done there.
_OF_PATHS = _LASTING - {errno.ENOENT} | {errno.EROFS, errno.EEXIST}


def reason(error: BaseException) -> str:
    """The first line of the message, or the error's kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def path_problem(error: OSError) -> str | None:
    """What is to be said of a file or folder that cannot be had and whose path the error names; None for anything else."""
    path = error.filename2 or error.filename  # of a file that is put into another's place, that
    if error.errno not in _OF_PATHS or path is None:
        return None
    return f"{os.fsdecode(path)}: cannot be read or written: {error.strerror}"


def unreadable(path: str | os.PathLike[str], error: OSError) -> UserError | RunError:
    """The error to raise where a file of a corpus cannot be read."""
    kind = UserError if error.errno in _LASTING else ReadError
    return kind(f"data: cannot read {str(path)!r}: {error.strerror or reason(error)}")


class Changed(UserError):
    """A file of a corpus is another than when the run began to read it."""


def changed(path: str | os.PathLike[str]) -> Changed:
    """The error to raise where a file is another than the one whose documents were found."""
    return Changed(f"data: {os.fspath(path)!r} has changed since this run began to read it; start the run again")
