"""The files behind a URL: which there are, how large, and in which version."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from titan_ext.data.corpora.signature import HEAD_BYTES
from titan_ext.data.corpora.tree import RESOURCE_FORKS, Tree
from titan_ext.data.remote.parallel import in_parallel
from titan_ext.error_text import renamed
from titan_ext.errors import RunError, UserError
from titan_ext.object_store import patiently

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation")
"""What file systems call a mark of a file's content; those after them have only its time."""
_TIMES = ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "modified", "created")
_FLATTENED = re.compile(r"(?<!\w)([a-z][a-z0-9+.-]+):/(?!/)")
_LOOKED_AT_TOGETHER = 16
_MAGIC = re.compile(r"[*?[]")
_WEB_MAGIC = re.compile(r"[*[]")
"""In the address of a web page, a question mark begins what the server is asked."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as it was listed."""

    url: str
    size: int | None
    """Bytes; None where a web server does not say."""
    version: str
    """Changes with its content, or with the time of the last change; empty where neither is known."""


class RemotePath(PurePosixPath):
    """Place of a remote file, for what looks at names and beginnings of files: it can be opened, as a ``Path`` can."""

    file: RemoteFile
    retry_seconds: float
    """How long its server may be away."""

    @classmethod
    def of(cls, file: RemoteFile, retry_seconds: float) -> Path:
        """The place of a file: ``s3:/bucket/name``, as paths have no empty parts."""
        found = cls(_without_query(file.url))
        found.file, found.retry_seconds = file, retry_seconds
        return cast(Path, found)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file's first ``HEAD_BYTES``.

        Raises:
            UserError: it cannot be read.
            ReadError: its server is away.
        """
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The file's first ``HEAD_BYTES``; raises as ``open``."""
        return _head(self.file, self.retry_seconds)


def list_tree(name: str, retry_seconds: float) -> Tree:
    """The files that a URL names: itself, all below it, or those that fit its pattern. Listed once a process.

    Raises:
        UserError: nothing is there, or it cannot be listed; the line begins with ``data = 'URL'``.
        ReadError: the server has been away for so long.
    """
    return _list_tree(name, retry_seconds)


@lru_cache(maxsize=64)
def _list_tree(name: str, retry_seconds: float) -> Tree:
    infos = as_data(name, lambda files: _found(files, name), retry_seconds)
    root = PurePosixPath(_without_query(_fixed_part(name)))
    if not infos:
        raise UserError(f"data = {name!r}: nothing is there")
    paths = [PurePosixPath(_without_query(url)) for url in infos]
    parts = {url: path.parts[len(root.parts) :] for url, path in zip(infos, paths, strict=True)}
    shown = [url for url in infos if not any(part.startswith(".") or part == RESOURCE_FORKS for part in parts[url])]
    # As in a folder: its files by name, then those of its folders.
    shown.sort(key=lambda url: [(place + 1 < len(parts[url]), part) for place, part in enumerate(parts[url])])
    files = _complete(name, [_file(url, infos[url]) for url in shown], retry_seconds)
    return Tree(
        cast(Path, root), [RemotePath.of(file, retry_seconds) for file in files], hidden=len(infos) - len(shown)
    )


def names_below(url: str, retry_seconds: float) -> list[str]:
    """URLs of what is directly below a URL, files and folders, in order; raises as ``list_tree``."""

    def found(files: "AbstractFileSystem") -> list[str]:
        return [files.unstrip_protocol(path) for path in files.ls(url, detail=False)]

    return sorted(
        each.rstrip("/") for each in as_data(url, found, retry_seconds) if each.rstrip("/") != url.rstrip("/")
    )


@lru_cache
def names_that_fit(pattern: str, retry_seconds: float) -> tuple[str, ...]:
    """URLs of the files and folders that fit a pattern, in order; raises as ``list_tree``."""

    def found(files: "AbstractFileSystem") -> list[str]:
        return [files.unstrip_protocol(path) for path in files.glob(pattern)]

    return tuple(sorted(each.rstrip("/") for each in as_data(pattern, found, retry_seconds)))


def as_data(name: str, operation: "Callable[[AbstractFileSystem], _Result]", retry_seconds: float) -> _Result:
    """As ``patiently``, with errors that begin as those of other corpora do."""
    try:
        return patiently(name, operation, retry_seconds)
    except (UserError, RunError) as error:
        raise renamed(error, lambda text: f"data = {text}") from error


def with_urls(text: str) -> str:
    """A message in which places of ``RemotePath`` read as the URLs that they are."""
    return _FLATTENED.sub(lambda found: f"{found[1]}:{'///' if found[1] == 'file' else '//'}", text)


def has_pattern(name: str) -> bool:
    """Whether a URL names several files by a pattern."""
    magic = _WEB_MAGIC if is_web(name) else _MAGIC
    return magic.search(name) is not None


def version_of(info: dict[str, Any]) -> str:
    """A file's version, by what its file system says of it."""
    found = next((info[key] for key in (*_VERSIONS, *_TIMES) if info.get(key)), "")
    # Of a list of files it may be a number, of a single one a time.
    return str(found.timestamp() if isinstance(found, datetime) else found)


def _found(files: "AbstractFileSystem", name: str) -> dict[str, dict[str, Any]]:
    """What is known of each file, by its URL."""
    if has_pattern(name):
        infos = files.glob(name, detail=True)
    elif is_web(name) and (name.endswith("/") or not PurePosixPath(_without_query(name)).suffix):
        infos = files.find(name.rstrip("/") + "/", detail=True)  # the links of a page
    else:
        info = files.info(name)
        if info["type"] != "directory":
            return {name: info}
        infos = files.find(name, detail=True)
    return {files.unstrip_protocol(path): info for path, info in infos.items() if info["type"] == "file"}


def _file(url: str, info: dict[str, Any]) -> RemoteFile:
    return RemoteFile(url, info.get("size"), version_of(info))


def _complete(name: str, listed: Sequence[RemoteFile], retry_seconds: float) -> list[RemoteFile]:
    """The files; a list of links tells no sizes."""
    found = {file.url: file for file in listed}

    def look(file: RemoteFile) -> None:
        found[file.url] = _file(file.url, as_data(file.url, lambda files: files.info(file.url), retry_seconds))

    in_parallel(look, [file for file in listed if file.size is None and file.url != name], _LOOKED_AT_TOGETHER)
    return list(found.values())


@lru_cache(maxsize=1024)
def _head(file: RemoteFile, retry_seconds: float) -> bytes:
    if file.size == 0:
        return b""

    def read(files: "AbstractFileSystem") -> bytes:
        with files.open(file.url, "rb", cache_type="none") as opened:
            return opened.read(HEAD_BYTES)

    return as_data(file.url, read, retry_seconds)


def _fixed_part(name: str) -> str:
    """A folder's URL, or that of the last folder before a pattern."""
    if not has_pattern(name):
        return name
    return name[: _MAGIC.search(name).start()].rpartition("/")[0]


def is_web(name: str) -> bool:
    """Whether a URL is of a web server."""
    return name.lower().startswith(("http://", "https://"))


def _without_query(url: str) -> str:
    return re.split(r"[?#]", url, maxsplit=1)[0] if is_web(url) else url
