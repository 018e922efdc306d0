"""What the ranks of a site do at an object store together: all of them try again while it is away, or none."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from titan_ext.error_text import first_failure
from titan_ext.object_store import Patience, file_system
from titan_ext.semi_sync.site.ranks import SiteRanks

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_Found = TypeVar("_Found")


class StoreRanks:
    """The ranks of this site before an object store.

    A rank that waited by itself would let the others' collectives run into their time limits, so every attempt is one
    of all ranks, and rank 0 decides whether there is another.

    Args:
        retry_seconds: how long to try while the store is away.
    """

    def __init__(self, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        self._site = SiteRanks()

    def ask(self, url: str, operation: "Callable[[AbstractFileSystem], _Found]") -> _Found:
        """What an operation of rank 0's comes to, at every rank. A collective.

        Raises:
            UserError: the store's answer is final.
            ReadError: it stays away.
        """
        return self.together(url, lambda: self.ask_once(url, operation))

    def ask_once(self, url: str, operation: "Callable[[AbstractFileSystem], _Found]") -> _Found:
        """As ``ask``, for a part of an attempt that ``together`` repeats."""
        found, failure = None, None
        if self._site.rank == 0:
            try:
                found = operation(file_system(url))
            except Exception as error:  # noqa: BLE001 - whatever the libraries below fsspec raise
                failure = error
        found, failed = self._site.gather((found, failure is not None))[0]
        if failed:
            raise _Failed(failure)
        return found

    def together(self, url: str, attempt: Callable[[], _Found]) -> _Found:
        """What an attempt comes to that succeeds at all ranks or fails at all of them. A collective.

        Args:
            url: of what is tried.
            attempt: a collective of torch's distributed checkpoints, after calls of ``ask_once``, if any.

        Raises:
            UserError, ReadError: as ``ask``.
        """
        patience = Patience(url, self._retry_seconds)
        while True:
            try:
                found = attempt()
            except _Failed as error:
                cause = error.cause
            except CheckpointException as error:
                cause = first_failure(error)
            else:
                patience.answered()
                return found
            time.sleep(self._site.first(lambda: patience.pause(cause)))  # noqa: B023 - called at once


class _Failed(Exception):
    """An attempt of rank 0's failed; at the other ranks without the cause."""

    def __init__(self, cause: Exception | None) -> None:
        super().__init__()
        self.cause: Any = cause
