"""What another library's error says, in one line, and whether trying again can help."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable

from titan_ext.errors import ReadError, RunError, UserError

# What a restart does not change; any other failure to read may pass.
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
# What is wrong with a path that the user chose, whatever was to be done there.
_OF_PATHS = _LASTING - {errno.ENOENT} | {errno.EROFS, errno.EEXIST}
# What a server's answers become that it would give again.
_REFUSED = _LASTING | {errno.EINVAL, errno.ENOSYS, errno.EMSGSIZE, errno.EEXIST, errno.EREMCHG}
_NETWORK = frozenset(
    "adlfs aiobotocore aiohttp azure botocore gcsfs httpcore httpx huggingface_hub paramiko requests urllib3".split()
)
"""Libraries whose errors are those of a connection."""
_CREDENTIALS = re.compile(r"Credential|Profile|Token|ParamValidation|UnknownRegion|InvalidEndpoint")
"""In names of botocore's errors that no server has a part in."""
_PASSING_STATUS = (408, 425, 429)
"""Of HTTP's answers that blame the client, those that ask it to come again."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def print_anything() -> None:
    """Let characters that the terminal or the log has none for be printed as others instead of ending the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reason(error: BaseException) -> str:
    """The first line of the message, or the error's kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def renamed(error: UserError | RunError, change: Callable[[str], str]) -> UserError | RunError:
    """The same error with another line."""
    return type(error)(change(str(error)))


def first_failure(error: BaseException) -> BaseException:
    """What the first of the ranks met with that failed in torch's ``CheckpointException``; of any other error, itself."""
    failures = getattr(error, "failures", {})
    return next((cause for cause, _ in failures.values()), error)


def path_error(error: OSError) -> UserError | RunError | None:
    """The error to end with where a disk is full, or a file or folder cannot be had that the error names; None for
    anything else."""
    path = error.filename2 or error.filename  # of a file that is put into another's place, that
    if error.errno in _NO_ROOM:
        return unwritable("a file" if path is None else os.fsdecode(path), error)
    if error.errno not in _OF_PATHS or path is None:
        return None
    return UserError(f"{os.fsdecode(path)}: cannot be read or written: {error.strerror}")


def unwritable(what: str, error: OSError) -> UserError | RunError:
    """The error to raise where something cannot be written.

    Args:
        what: its path, behind the flag or key that names it.
        error: the reason; a full disk may have room again after a restart.
    """
    problem = f"{what}: cannot be written: {error.strerror or reason(error)}"
    if error.errno in _NO_ROOM:
        return RunError(f"{problem}; make room on its disk, or name another place")
    return UserError(problem)


def may_pass(error: BaseException) -> bool:
    """Whether a failure is the network's, the server's or the disk's, so that the same may succeed later."""
    error = _of_web_server(error)
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if _CREDENTIALS.search(type(error).__name__) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _REFUSED
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    # A ValueError of such a library finds fault with what it was given.
    is_of_network = type(error).__module__.partition(".")[0] in _NETWORK and not isinstance(error, ValueError)
    return isinstance(error, OSError | EOFError) or is_of_network


def _of_web_server(error: BaseException) -> BaseException:
    """What went wrong: fsspec says of whatever happens to the look at a file on a web server that it is not there."""
    cause = error.__cause__
    is_hidden = isinstance(error, FileNotFoundError) and isinstance(cause, Exception)
    return cause if is_hidden and type(cause).__module__.partition(".")[0] in ("aiohttp", "builtins") else error


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        named = ((error, "status"), (error, "code"), (response, "status_code"))
        found = next((getattr(holder, name) for holder, name in named if hasattr(holder, name)), None)
    return found if isinstance(found, int) else None


def unreadable(path: str | os.PathLike[str], error: OSError) -> UserError | RunError:
    """The error to raise where a file of a corpus cannot be read."""
    kind = UserError if error.errno in _LASTING else ReadError
    return kind(f"data: cannot read {str(path)!r}: {error.strerror or reason(error)}")


class Changed(UserError):
    """A file of a corpus is another than when the run began to read it."""


def changed(path: str | os.PathLike[str]) -> Changed:
    """The error to raise where a file is another than the one whose documents were found."""
    return Changed(f"data: {os.fspath(path)!r} has changed since this run began to read it; start the run again")
