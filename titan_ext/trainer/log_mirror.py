"""Copies of a site's logs beside its checkpoints on an object store, which outlive its disk."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_ext.checkpoint_place import checkpoint_folder
from titan_ext.config.resolved import FILE_NAME as RECORD
from titan_ext.object_store import is_url, patiently

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LOGS = ("commits.jsonl", "metrics.jsonl")
"""Files that grow by lines."""
OF_FIRST_RANK, OF_LOGGING_RANK = (RECORD, "commits.jsonl"), ("metrics.jsonl", "summary.json")
"""Which rank writes what, maybe each on a disk of its own."""
_MOST_BYTES = 64 * 2**20
"""Of a log's last lines that are copied."""


def mirror_logs(dump_folder: str, part: str, names: Iterable[str]) -> None:
    """Copy files of a site's, of long ones the end; those that are not there yet are left out.

    Args:
        dump_folder: the site's.
        part: URL of its part of the store.
        names: of the files.

    Raises:
        UserError, ReadError: the store does not take them.
    """
    for name in names:
        path = Path(dump_folder) / name
        if path.is_file():
            content, place = _end_of(path), f"{part}/{name}"
            patiently(place, lambda files: files.pipe_file(place, content), retry_seconds=0)  # noqa: B023 - at once


def fetch_logs(config: Any) -> list[str]:
    """Bring to a node's disk the logs that the site's part of a store has more of, as after a move to another machine.

    Args:
        config: the site's ``Trainer.Config``.

    Raises:
        UserError, ReadError: the store cannot be read.

    Returns:
        the URLs of those that were brought; none where checkpoints are in a folder.
    """
    dump_folder, retry_seconds = config.dump_folder, config.checkpoint.retry_seconds
    folder = checkpoint_folder(dump_folder, config.checkpoint.folder)
    if not config.checkpoint.enable or not is_url(folder):
        return []
    fetched, part = [], os.path.dirname(folder)
    for name in LOGS:
        path, place = Path(dump_folder) / name, f"{part}/{name}"
        size = patiently(place, lambda files: _size(files, place), retry_seconds)  # noqa: B023 - at once
        if size > (path.stat().st_size if path.is_file() else 0):
            content = patiently(place, lambda files: files.cat_file(place), retry_seconds)  # noqa: B023 - at once
            draft = path.with_name(f".{name}.{os.getpid()}")  # nodes may share the folder
            draft.write_bytes(content)
            os.replace(draft, path)
            fetched.append(place)
    return fetched


def _end_of(path: Path) -> bytes:
    """Its last whole lines."""
    with open(path, "rb") as file:
        skipped = max(0, path.stat().st_size - _MOST_BYTES)
        file.seek(skipped)
        if skipped:
            file.readline()
        return file.read()


def _size(files: "AbstractFileSystem", place: str) -> int:
    try:
        return files.size(place) or 0
    except FileNotFoundError:
        return 0
