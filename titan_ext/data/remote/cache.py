"""Copies of remote files in a local folder of bounded size, which processes of a machine share.

A file is copied whole, by one process while others wait for it, and is there under its name only when it is complete.
What has not been used for longest is deleted to make room, except what a process uses at the moment: each says so in a
file of its own, which it keeps locked for as long as it lives.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from titan_ext.data.corpora.files import CorpusFile, Format
from titan_ext.data.corpora.unpacked import blocks
from titan_ext.data.remote.download import download, write
from titan_ext.data.remote.files import RemoteFile
from titan_ext.data.remote.parallel import in_parallel
from titan_ext.error_text import may_pass, reason, renamed
from titan_ext.errors import RunError, UserError

GIB = 1 << 30
_USERS, _LOCK = "users", "lock"
_PART, _UNPACKED = ".part", ".unpacked"
_AT_A_TIME = 8
_LONGEST_NAME = 150


@dataclass(frozen=True, slots=True)
class Wanted:
    """A remote file of a corpus; its copy is unpacked."""

    remote: RemoteFile
    format: Format
    compression: str

    @property
    def name(self) -> str:
        """Of the copy: another for every version."""
        file = self.remote
        known = hashlib.blake2b(f"{file.url}\n{file.size}\n{file.version}".encode(), digest_size=12).hexdigest()
        shown = CorpusFile(Path(Path(file.url.partition("?")[0]).name), self.format, self.compression).unpacked_name
        return f"{known}-{shown[-_LONGEST_NAME:]}"

    @property
    def salt(self) -> int:
        """64 bits that follow from its name and size, wherever it lies."""
        known = f"{Path(self.remote.url).name}\n{self.remote.size}"
        return int.from_bytes(hashlib.blake2b(known.encode(), digest_size=8).digest(), "big")


class Lease:
    """Copies that stay for as long as this object does.

    Args:
        paths: of the copies, one for each file.
        cache: what says to other processes that they are used.
    """

    def __init__(self, paths: Sequence[Path], cache: "FileCache") -> None:
        self.paths = list(paths)
        self._cache = cache


class FileCache:
    """The folder.

    Args:
        folder: where; empty: ``titan_ext`` in the user's cache folder.
        most_gib: GiB that the copies may take.
        retry_seconds: how long servers may be away.

    Raises:
        UserError: the folder cannot be made, or its file system has no locks.
    """

    def __init__(self, folder: str, most_gib: float, retry_seconds: float) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.most_gib = most_gib
        self._retry_seconds = retry_seconds
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._user: tuple[int, Any] | None = None
        self._told_of_size = False
        with self._locked():
            pass

    def lease(self, files: Sequence[Wanted]) -> Lease:
        """Copies of files; those that are not there are fetched, several at a time.

        Raises:
            UserError: a file has changed, cannot be unpacked, or may not be read.
            ReadError: a server has been away for too long.
            NoRoom: the disk is full.
        """
        lease = Lease([self.folder / file.name for file in files], self)
        with self._locked():
            self._leases.add(lease)
            self._say_what_is_used()
            missing = [file for file, path in zip(files, lease.paths, strict=True) if not _touch(path)]
            if missing:
                self._make_room(sum(file.remote.size or 0 for file in missing))
        in_parallel(self._fetch, missing, _AT_A_TIME)
        return lease

    def _fetch(self, file: Wanted) -> None:
        path = self.folder / file.name
        part = path.with_name(file.name + _PART)
        while True:
            with open(part, "ab+") as target, _alone(target):
                if not _is(part, target):
                    continue  # another process had it, and has finished or failed
                if path.exists():
                    part.unlink()
                    return
                try:
                    self._fill(file, target, path)
                except BaseException:
                    part.unlink(missing_ok=True)
                    raise
                return

    def _fill(self, file: Wanted, part: IO[bytes], path: Path) -> None:
        """Complete a part that this process alone has, and put it into its place."""
        part.truncate(0)
        part.seek(0)
        download(file.remote, part, self._retry_seconds)
        os.fsync(part.fileno())
        if file.compression:
            self._unpack(file, Path(part.name), path)
        else:
            os.rename(part.name, path)

    def _unpack(self, file: Wanted, packed: Path, path: Path) -> None:
        unpacked = path.with_name(f"{path.name}{_UNPACKED}")
        try:
            with open(unpacked, "wb") as target:
                for block in blocks(CorpusFile(packed, file.format, file.compression)):
                    write(block, target, file.remote.url)
                os.fsync(target.fileno())
            os.rename(unpacked, path)
        except (UserError, RunError) as error:
            raise renamed(error, lambda text: text.replace(str(packed), file.remote.url)) from error
        finally:
            packed.unlink()
            unpacked.unlink(missing_ok=True)
        with self._locked():
            self._make_room(0)

    def _make_room(self, need: int) -> None:
        """Delete what was used longest ago and is not used now until ``need`` bytes more are within the limit."""
        used = self._used()
        there = list(_files(self.folder))
        held = sum(status.st_size for _, status in there)
        limit, free = self.most_gib * GIB, shutil.disk_usage(self.folder).free
        for name, status in sorted(there, key=lambda each: each[1].st_atime_ns):
            if held + need <= limit and need <= free:
                return
            if name != _LOCK and name.removesuffix(_PART).removesuffix(_UNPACKED) not in used:
                (self.folder / name).unlink(missing_ok=True)
                held, free = held - status.st_size, free + status.st_size
        if held + need > limit and not self._told_of_size:
            self._told_of_size = True
            logging.getLogger().warning(
                "data.cache_gib = %g: the files that are read at the moment, and the next, take %.1f GiB in %s",
                self.most_gib,
                (held + need) / GIB,
                self.folder,
            )

    def _say_what_is_used(self) -> None:
        if self._user is None or self._user[0] != os.getpid():  # a fork's files are not its parent's
            (self.folder / _USERS).mkdir(exist_ok=True)
            file = tempfile.NamedTemporaryFile("w", dir=self.folder / _USERS, prefix=f"{os.getpid()}-", delete=False)
            fcntl.flock(file, fcntl.LOCK_EX)
            self._user = (os.getpid(), file)
        file = self._user[1]
        file.seek(0)
        file.truncate()
        file.writelines(f"{path.name}\n" for lease in self._leases for path in lease.paths)
        file.flush()

    def _used(self) -> set[str]:
        """Names that processes which live use; what dead ones have left is taken away."""
        found: set[str] = set()
        for path in (self.folder / _USERS).iterdir():
            with open(path, encoding="utf-8") as file:
                if _is_free(file):
                    path.unlink()
                else:
                    found.update(file.read().splitlines())
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that share the folder, for a moment."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / _LOCK, "a") as file, _alone(file):
                yield
        except OSError as error:
            kind = RunError if may_pass(error) else UserError
            raise kind(
                f"data.cache_folder = {str(self.folder)!r}: cannot be used: {error.strerror or reason(error)}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_leases": weakref.WeakSet(), "_user": None}


def default_folder() -> Path:
    """``titan_ext`` where the user's programs keep what can be had again.

    Raises:
        UserError: the user has no such place.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan_ext"
    except RuntimeError as error:
        raise UserError("data.cache_folder is missing: this user has no home folder") from error


def _touch(path: Path) -> bool:
    """Whether a copy is there; notes that it is used, leaving the time of its last change, by which readers know it."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _alone(file: IO[Any]) -> Iterator[None]:
    """The lock of a file. It is given back, not left to the file's end: a process forked meanwhile has it open too."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another process has just completed it
            if entry.is_file():
                yield entry.name, entry.stat()


def _is(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_free(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
