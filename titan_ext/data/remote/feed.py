"""Documents of a corpus behind a URL, of which only the files that are read, and the next, are on this machine.

Nobody knows how many documents there are before all has been fetched. So an epoch goes through the files, in an order of
its own, by windows of a few of them; within a window the documents are shuffled as those of a local corpus.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from titan_ext.data.bad_records import BadRecords
from titan_ext.data.corpora.listing import Listing
from titan_ext.data.feed import Document, Selection
from titan_ext.data.order import mix, share
from titan_ext.data.progress import WINDOW
from titan_ext.data.remote.cache import FileCache, Lease, Wanted
from titan_ext.data.remote.files import RemotePath
from titan_ext.data.remote.window import Reading, Window
from titan_ext.errors import RunError, UserError
from titan_ext.launcher.text import bytes_text

_WINDOW_BYTES = 1 << 28
"""A window ends before the file with which its files would be larger; it has one file at least."""
_AHEAD_AFTER = 0.1
"""The part of a window that is read before the next one is fetched: some readers only look at a beginning."""
_TOLD_SECONDS = 5.0


class RemoteFeed:
    """The site's documents of a remote corpus.

    A place is an integer, as in a local corpus: of all documents of an epoch a reader's n-th is number ``n * shards +
    shard``, where each window has ``WINDOW`` numbers and uses the first ones.

    Args:
        listing: the corpus's files.
        reading: how they are read.
        cache: where they are kept.
        bad_records: what becomes of documents that cannot be used.
    """

    def __init__(self, listing: Listing, reading: Reading, cache: FileCache, bad_records: BadRecords) -> None:
        self.name = reading.name
        self.bad_records = bad_records
        self._listing, self._reading, self._cache = listing, reading, cache
        self._selection: Selection = reading.selection
        self.files = [Wanted(cast(RemotePath, file.path).file, file.format, file.compression) for file in listing.files]
        """All of the corpus."""
        self._window: tuple[tuple[int, int], Window] | None = None
        self._ahead: _Ahead | None = None

    def __str__(self) -> str:
        files = f"{self._listing}; {bytes_text(self.size)}"
        taken = len(self._dealt())
        some = "" if taken == len(self.files) else f", {taken} of its files taken"
        return f"{files}{some}; copies of up to {self._cache.most_gib:g} GiB in {self._cache.folder}"

    @property
    def size(self) -> int:
        """Bytes of all files, as far as their servers tell."""
        return sum(file.remote.size or 0 for file in self.files)

    @property
    def sources(self) -> list[str]:
        """URLs of the files."""
        return [file.remote.url for file in self.files]

    def read(self, epoch: int, place: int | None, shard: int, shards: int) -> Iterator[Document]:
        """Documents of part ``shard`` of ``shards`` in ``epoch``, from ``place`` on (None: the start)."""
        windows = self._windows(epoch)
        number, first = divmod((place or 0) * shards + shard, WINDOW)
        while number < len(windows):
            window = self._open(epoch, number, windows)
            for position in range(first, len(window.documents), shards):
                if position >= _AHEAD_AFTER * len(window.documents):
                    self._fetch_ahead(epoch, number, windows)
                yield self._document(window, int(window.documents[position]), (number * WINDOW + position) // shards)
            number += 1
            first = (shard - number * WINDOW) % shards

    def settings(self) -> dict[str, Any]:
        """What a place means nothing without."""
        chosen = self._selection
        content = "".join(f"{file.remote.size} {file.remote.version}\n" for file in self.files)
        keyed = any(file.format != "text" for file in self.files)
        return {
            "dataset": self.name,
            "text_key": self._reading.text_key if keyed else None,
            "content": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
            "files": len(self.files),
            "seed": chosen.seed if chosen.shuffle else None,
            "shuffle_buffer": chosen.shuffle_buffer,
            "split": chosen.split_name,
            "holdout_fraction": chosen.holdout_fraction,
            "share_index": chosen.share_index,
            "share_count": chosen.share_count,
        }

    def check(self, shards: int) -> None:
        """Nothing: how many documents there are shows only when they are read."""

    def _document(self, window: Window, number: int, place: int) -> Document:
        file, within = int(window.files[number]), int(window.places[number])
        where = f"{self.files[file].remote.url!r}, document {within + 1}"
        text = self.bad_records.text(partial(window.read, number), where)
        return Document(place, text, file, file * WINDOW + within)

    def _dealt(self) -> np.ndarray:
        """Numbers of the files of which the site reads documents, ascending."""
        numbers, count = np.arange(len(self.files)), self._selection.share_count
        return share(numbers, self._selection.share_index, count) if len(numbers) >= count else numbers

    def _windows(self, epoch: int) -> list[np.ndarray]:
        """Numbers of the files of each window of an epoch, ascending within it."""
        numbers, chosen = self._dealt(), self._selection
        if chosen.shuffle:
            numbers = numbers[np.argsort(mix(numbers, chosen.seed, epoch, 1), kind="stable")]
        sizes = [self.files[number].remote.size for number in numbers]
        return [np.sort(numbers[start:stop]) for start, stop in _cuts(sizes, chosen.shuffle_buffer)]

    def _open(self, epoch: int, number: int, windows: Sequence[np.ndarray]) -> Window:
        if self._window is None or self._window[0] != (epoch, number):
            begun = time.monotonic()
            window = Window(self._reading, self._cache, self.files, windows[number], epoch, number)
            self._window = (epoch, number), window
            self.bad_records.leave_out(window.problems)
            if (waited := time.monotonic() - begun) > _TOLD_SECONDS:
                logging.getLogger().info(
                    "data: waited %.0f s for %d files of %s", waited, len(windows[number]), self.name
                )
        return self._window[1]

    def _fetch_ahead(self, epoch: int, number: int, windows: Sequence[np.ndarray]) -> None:
        wanted = (os.getpid(), epoch, number)
        if self._ahead is not None and self._ahead.after == wanted:
            return
        following = windows[number + 1] if number + 1 < len(windows) else self._windows(epoch + 1)[0]
        self._ahead = _Ahead(wanted, self._cache, [self.files[each] for each in following])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_window": None, "_ahead": None}


class _Ahead:
    """Fetches files while others are read. What goes wrong is met again by who needs them.

    Args:
        after: by what it is known.
        cache: where to.
        files: which.
    """

    def __init__(self, after: tuple[int, int, int], cache: FileCache, files: Sequence[Wanted]) -> None:
        self.after = after
        self.lease: Lease | None = None
        """Keeps what has been fetched."""
        threading.Thread(target=self._fetch, args=(cache, files), daemon=True).start()

    def _fetch(self, cache: FileCache, files: Sequence[Wanted]) -> None:
        try:
            self.lease = cache.lease(files)
        except (UserError, RunError) as error:
            logging.getLogger().debug("data: ahead of its use: %s", error)


def _cuts(sizes: Sequence[int | None], most_files: int) -> Iterator[tuple[int, int]]:
    """Where windows of files begin and end; a file of unknown size is one alone."""
    start = held = 0
    for number, size in enumerate(sizes):
        held += _WINDOW_BYTES if size is None else size
        if number > start and (held > _WINDOW_BYTES or number - start >= most_files):
            yield start, number
            start, held = number, _WINDOW_BYTES if size is None else size
    if sizes:
        yield start, len(sizes)
