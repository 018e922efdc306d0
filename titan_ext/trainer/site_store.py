"""A site's part of an object store: its checkpoints, copies of its logs, and who saves there."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from torchtitan.tools.logging import logger

from titan_ext.checkpoint_place import files_below, steps_in
from titan_ext.errors import RunError, UserError
from titan_ext.trainer.log_mirror import mirror_logs
from titan_ext.trainer.ownership import Ownership
from titan_ext.trainer.store_ranks import StoreRanks

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_Result = TypeVar("_Result")


class SiteStore:
    """Where a site saves that has a URL for ``checkpoint.folder``.

    Args:
        folder: URL of the site's checkpoints.
        dump_folder: the site's, with its logs.
        ranks: the site's.
    """

    def __init__(self, folder: str, dump_folder: str, ranks: StoreRanks) -> None:
        self._folder, self._dump_folder, self._ranks = folder, dump_folder, ranks
        self._part, self._last_step = os.path.dirname(folder), 0
        self._ownership = Ownership(self._part, dump_folder)
        # One rank's wait for a store that does not answer is not to be the other ranks' in their next collective.
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="titan_ext-store")

    def take(self) -> str | None:
        """Take the part over, also so as to know now that it can be written; what is to be said of that. A collective.

        Raises:
            UserError, ReadError: it cannot be written.
        """
        return self._ranks.ask(self._part, self._ownership.take)

    def save(self, checkpoint: str, write: Callable[[], _Result]) -> _Result:
        """What writing a checkpoint comes to, which is tried again while the store is away. A collective.

        Args:
            checkpoint: its URL; what an earlier attempt left there goes first.
            write: a collective, too.

        Raises:
            TakenOver: another run saves here now.
            UserError, ReadError: it cannot be written.
        """

        self._last_step = int(checkpoint.rpartition("-")[2])

        def attempt() -> _Result:
            self._ranks.ask_once(self._part, self._ownership.check)
            self._ranks.ask_once(checkpoint, lambda files: _remove(files, checkpoint))
            return write()

        return self._ranks.together(checkpoint, attempt)

    def hand_over_old(self, keep: int, take: Callable[[str], None]) -> None:
        """Call ``take``, in the background, for each checkpoint that is to be removed after a save."""
        last = self._last_step

        def hand_over() -> None:
            for checkpoint in self.old(keep, last):
                take(checkpoint)

        self._beside.submit(hand_over)

    def old(self, keep: int, last: int) -> list[str]:
        """URLs of checkpoints to be removed: all before the latest ``keep`` whole ones, and what failed saves have left.

        Args:
            keep: how many stay.
            last: the step of the last save. What it and later ones write is never removed: they may still be at it, where
                a run has gone back to an earlier step.
        """
        try:
            files = files_below(self._folder)
        except (RunError, UserError) as error:
            logger.warning("old checkpoints are not removed for now: %s", error)
            return []
        steps = sorted(steps_in(self._folder, files))
        whole = [step for step in steps if f"step-{step}/.metadata" in files]
        old = [step for step in steps if step < last and whole and step < whole[-1] and step not in whole[-keep:]]
        return [f"{self._folder}/step-{step}" for step in old]

    def mirror_logs(self, names: Iterable[str]) -> None:
        """Copy files of the site's dump folder here, in the background; what stands in the way is said, and does no harm."""
        self._beside.submit(self._mirror, names)

    def close(self) -> None:
        """Wait for what is done in the background."""
        self._beside.shutdown()

    def _mirror(self, names: Iterable[str]) -> None:
        try:
            mirror_logs(self._dump_folder, self._part, names)
        except (RunError, UserError, OSError) as error:
            logger.warning("the logs are not copied for now: %s", error)


def _remove(files: "AbstractFileSystem", checkpoint: str) -> None:
    # Its metadata first: without it it is no checkpoint.
    with suppress(FileNotFoundError):
        files.rm_file(f"{checkpoint}/.metadata")
    with suppress(FileNotFoundError):
        files.rm(checkpoint, recursive=True)
