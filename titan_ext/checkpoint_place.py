"""Where a site's checkpoints lie, in a folder or behind a URL: the files there, and what reads them."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader

from titan_ext.object_store import is_url, patiently

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CHECKPOINTS = "checkpoint"
"""What a site's checkpoints lie in, below its own part of a URL."""


def checkpoint_folder(dump_folder: str, folder: str) -> str:
    """Where a site's checkpoints lie.

    Args:
        dump_folder: the site's, whose last part is its name.
        folder: ``checkpoint.folder``: a folder in that one, or a URL, below which each site has a part of its own.
    """
    if is_url(folder):
        return "/".join((folder.rstrip("/"), Path(dump_folder).name, CHECKPOINTS))
    return os.path.join(dump_folder, folder)


def files_below(url: str, retry_seconds: float = 0.0) -> dict[str, int]:
    """The sizes in bytes of the files below a URL, by their path in it; empty where there is nothing.

    Raises:
        UserError, ReadError: there is no such bucket, or as ``patiently``.
    """
    return patiently(url, lambda files: sizes_below(files, url), retry_seconds)


def sizes_below(files: "AbstractFileSystem", url: str) -> dict[str, int]:
    """As ``files_below``, by one look at a file system that may fail."""
    root = files._strip_protocol(url).rstrip("/") + "/"
    found = files.find(url, detail=True)
    return {name.removeprefix(root): entry["size"] for name, entry in found.items() if name.startswith(root)}


def steps_in(folder: str, files: Iterable[str] | None) -> set[int]:
    """The steps of which a folder has anything."""
    names = {path.partition("/")[0] for path in files or ()}  # what other nodes have may be all that is left
    if not is_url(folder) and os.path.isdir(folder):
        names |= {*os.listdir(folder)}
    return {int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))}


def reader(checkpoint: str | os.PathLike[str]) -> FileSystemReader:
    """What reads a checkpoint in torch's distributed format."""
    if is_url(checkpoint):
        return FsspecReader(checkpoint, use_listings_cache=False)
    return FileSystemReader(checkpoint)


def read_text(place: str, retry_seconds: float = 0.0) -> str | None:
    """The text of a file or of what is behind a URL; None where there is none.

    Raises:
        UserError, ReadError: as ``patiently``.
        ValueError: it is no text.
    """
    if not is_url(place):
        return Path(place).read_text(encoding="utf-8") if os.path.isfile(place) else None
    return patiently(place, lambda files: _text_or_none(files, place), retry_seconds)


def _text_or_none(files: "AbstractFileSystem", place: str) -> str | None:
    try:
        return files.cat_file(place).decode()
    except FileNotFoundError:
        return None
