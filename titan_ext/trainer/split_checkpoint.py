"""Reads a checkpoint of which each node of the site holds the files that its own ranks have written.

With the layout that saved it a rank finds its shards on its own disk, and of other disks no more than what is the same
at several ranks and was written by one of them. Another layout takes more from elsewhere.
"""

import copy
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from titan_ext.errors import RunError
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.trainer.disks import StoredFile

_CHUNK_BYTES = 64 * 2**20

Stretch = tuple[str, int, int]
"""File, offset and length in bytes."""


class SplitReader(FileSystemReader):
    """Takes from the other ranks what is not on this rank's disk.

    Args:
        checkpoint: folder of one step, on each disk.
        metadata: of the checkpoint, which only one disk holds.
        files: of the checkpoint on all disks.
    """

    def __init__(self, checkpoint: str, metadata: Metadata, files: Mapping[str, StoredFile]) -> None:
        super().__init__(checkpoint)
        self.fs = _FileSystemWithGaps()
        self._metadata = metadata
        self._files = files
        self._fetched: dict[tuple[str, int], bytes] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata; the planner may change it."""
        return copy.deepcopy(self._metadata)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch's. A collective over the site."""
        infos = {(each.relative_path, each.offset, each.length) for each in map(self._info, plan.items)}
        own = Path(self.path)
        self._fetched = fetch(own, [each for each in sorted(infos) if not (own / each[0]).exists()], self._files)
        return super().read_data(plan, planner)

    def _info(self, item: Any) -> Any:
        return self.storage_data[item.storage_index]

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        fetched = self._fetched.get((sinfo.relative_path, sinfo.offset))
        return super()._slice_file(file, sinfo) if fetched is None else io.BytesIO(fetched)


def fetch(folder: Path, wanted: Iterable[Stretch], files: Mapping[str, StoredFile]) -> dict[tuple[str, int], bytes]:
    """Stretches of files by file and offset, read by whoever has them. A collective over the site.

    Args:
        folder: of the files, on each disk.
        wanted: by this rank.
        files: who has which.

    Raises:
        RunError: one of them cannot be read where it is.
    """
    site, rank, own = SiteRanks(), torch.distributed.get_rank(), set(wanted)
    every = sorted(set().union(*site.gather(own)))
    fetched: dict[tuple[str, int], bytes] = {}
    for chunk in _chunks(every):
        read = _read(folder, [each for each in chunk if files[each[0]].rank == rank])
        for part in site.gather(read):
            if isinstance(part, str):
                raise RunError(part)
            fetched |= {each[:2]: content for each, content in part.items() if each in own}
    return fetched


def _read(folder: Path, stretches: Iterable[Stretch]) -> dict[Stretch, bytes] | str:
    """The contents; in words why they cannot be read."""
    contents = {}
    try:
        for name, offset, length in stretches:
            with open(folder / name, "rb") as file:
                file.seek(offset)
                contents[name, offset, length] = file.read(length)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return contents


def _chunks(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    """Parts of a list that are sent at once; a stretch of more than a chunk is one by itself."""
    chunk: list[Stretch] = []
    for each in stretches:
        if chunk and sum(length for *_, length in chunk) + each[2] > _CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(each)
    if chunk:
        yield chunk


class _FileSystemWithGaps(FileSystem):
    """A file that is elsewhere opens as an empty one: what is read of it has been fetched."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode == "rb" and not os.path.exists(path):
            yield io.BytesIO()
            return
        with super().create_stream(path, mode) as stream:
            yield stream
