"""How the ranks of a site read checkpoints together: from one disk, from one at each node, or from an object store."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageReader

from titan_ext.checkpoint_place import reader, sizes_below
from titan_ext.error_text import reason
from titan_ext.object_store import is_url
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.trainer.disks import Disks, StoredFile, stored_files
from titan_ext.trainer.resuming import PartialLoadPlanner
from titan_ext.trainer.split_checkpoint import SplitReader
from titan_ext.trainer.store_ranks import StoreRanks
from titan_ext.trainer.stored_bytes import broken_part
from titan_ext.trainer.whole_checkpoints import Files, damage, has_metadata, latest_whole

_Found = TypeVar("_Found")


class SiteReader:
    """Reads what a site's run starts from; every method is a collective.

    Args:
        stores: the ranks before an object store.
    """

    def __init__(self, stores: StoreRanks) -> None:
        self.disks = Disks()
        """Which ranks see each other's files; the owner's to find out."""
        self._stores, self._site = stores, SiteRanks()
        self._sound: set[str] = set()

    def look(self, place: str, find: Callable[[], _Found]) -> _Found:
        """What rank 0 finds at a folder or URL, at every rank.

        Raises:
            UserError, RunError, OSError: as ``find``; ReadError: an object store stays away.
        """
        return self._stores.ask(place, lambda _: find()) if is_url(place) else self._site.first(find)

    def files(self, folder: str) -> Files | None:
        """What nodes with disks of their own have in a folder, or what is behind a URL; None where one disk tells all."""
        if is_url(folder):
            sizes = self._stores.ask(folder, lambda files: sizes_below(files, folder))
            return {path: StoredFile(size, rank=0) for path, size in sizes.items()}
        return None if self.disks.are_one else stored_files(folder, self.disks)

    def problem(self, checkpoint: str, files: Files | None) -> str | None:
        """What is wrong with a checkpoint; None for nothing."""
        return self.look(checkpoint, lambda: damage(checkpoint, files)) or self._broken(checkpoint, files)

    def latest_step(self, folder: str) -> int:
        """The step of the latest checkpoint that is whole; -1 if none has ever been.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        files = self.files(folder)
        broken: dict[int, str] = {}
        while (step := self.look(folder, lambda: latest_whole(folder, files, broken))) >= 0:
            problem = self._broken(f"{folder}/step-{step}", files)
            if problem is None:
                break
            broken[step] = problem
        return step

    def read(
        self, state_dict: dict[str, Any], checkpoint: str, files: Files | None, moved: Mapping[str, str] | None = None
    ) -> None:
        """Load tensors in place and states by themselves, from where a checkpoint in torch's format has them.

        Args:
            state_dict: what to load.
            checkpoint: its folder or URL.
            files: in it.
            moved: as ``PartialLoadPlanner`` has it.
        """

        def attempt(storage: StorageReader) -> None:
            dcp.load(state_dict, storage_reader=storage, planner=PartialLoadPlanner(moved or {}))

        if is_url(checkpoint):
            self._stores.together(checkpoint, lambda: attempt(reader(checkpoint)))
        elif files is None:
            attempt(reader(checkpoint))
        else:
            metadata = self._site.first(lambda: reader(checkpoint).read_metadata())
            attempt(SplitReader(checkpoint, metadata, files))

    def _broken(self, checkpoint: str, files: Files | None) -> str | None:
        """What is wrong with the bytes of a checkpoint, of which every rank reads a part; None for nothing, or where they
        are not all within reach."""
        # A store sees to the bytes that it has taken; of it they would have to come a second time.
        if files is not None or os.path.normpath(checkpoint) in self._sound:
            return None
        if not self._site.first(lambda: has_metadata(checkpoint)):
            return None
        try:
            own = broken_part(checkpoint, torch.distributed.get_rank(), torch.distributed.get_world_size())
        except OSError as error:
            own = reason(error)
        problem = next(filter(None, self._site.gather(own)), None)
        if problem is None:
            self._sound.add(os.path.normpath(checkpoint))
        return problem
