"""A few files of a remote corpus that are read together: as a local corpus of their copies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_ext.data.corpora.corpus import Corpus, Documents, parts_of
from titan_ext.data.corpora.files import CorpusFile
from titan_ext.data.feed import Selection
from titan_ext.data.order import epoch_order, held_out
from titan_ext.data.remote.cache import FileCache, Lease, Wanted
from titan_ext.error_text import renamed
from titan_ext.errors import RunError, UserError


@dataclass(frozen=True, slots=True)
class Reading:
    """How the files of a corpus are read."""

    name: str
    text_key: str
    keep: int
    """Rows of tables to keep."""
    tolerant: bool
    selection: Selection


class Window:
    """Documents of some files, in the order in which they are read.

    Args:
        reading: how.
        cache: where copies of the files are had.
        files: all of the corpus.
        numbers: which of them, ascending.
        epoch: whose order it is.
        place: of the window in that epoch.

    Raises:
        UserError: a file has changed, cannot be read, or is not what its name says; names its URL.
        ReadError: a server has been away for too long.
    """

    def __init__(
        self, reading: Reading, cache: FileCache, files: Sequence[Wanted], numbers: np.ndarray, epoch: int, place: int
    ) -> None:
        chosen = [files[number] for number in numbers]
        self._lease: Lease = cache.lease(chosen)
        self._urls = {str(path): file.remote.url for path, file in zip(self._lease.paths, chosen, strict=True)}
        parts = self._open(reading, chosen)
        self._corpus = Corpus(reading.name, parts) if any(map(len, parts)) else None
        self.problems = [self._told(problem) for problem in self._corpus.problems] if self._corpus else []
        """What is wrong with rows that were left out."""
        if self._corpus is None:
            self.documents = self.files = self.places = np.empty(0, np.int64)
            return
        by_url = {files[number].remote.url: number for number in numbers}
        numbers = np.array([by_url[self._urls[source]] for source in self._corpus.sources])
        within = self._corpus.source_numbers()
        self.files = numbers[within]
        """Number in the corpus of the file of each document, int64."""
        self.places = np.arange(len(within)) - np.searchsorted(within, within)
        """Where each document stands in its file, int64."""
        self.documents = self._order(reading.selection, files, epoch, place)
        """Numbers of the site's documents in reading order, int64."""

    def read(self, document: int) -> str:
        """The text of a document.

        Raises:
            BadRecord: it cannot be used.
        """
        try:
            return self._corpus.read(document)
        except (UserError, RunError) as error:
            raise renamed(error, self._told) from None

    def _open(self, reading: Reading, chosen: Sequence[Wanted]) -> list[Documents]:
        copies = zip(self._lease.paths, chosen, strict=True)
        local = [CorpusFile(path, file.format) for path, file in copies]
        try:
            return parts_of(local, reading.text_key, reading.keep, reading.tolerant, remember=False)
        except (UserError, RunError) as error:
            raise renamed(error, self._told) from error

    def _order(self, selection: Selection, files: Sequence[Wanted], epoch: int, place: int) -> np.ndarray:
        taken = np.ones(len(self.files), bool)
        if len(files) < selection.share_count:
            taken &= self.places % selection.share_count == selection.share_index
        if selection.split_name != "all" and selection.holdout_fraction:
            known = np.array([file.salt for file in files], np.uint64)[self.files]
            taken &= held_out(known, self.places, selection.holdout_fraction) == (selection.split == "validation")
        documents = np.flatnonzero(taken)
        if not selection.shuffle:
            return documents
        units = self._corpus.units()
        units = None if units is None else units[documents]
        # The first window of an epoch is in the order of a local corpus of the same files.
        return epoch_order(documents, units, selection.seed, epoch + (place << 32), selection.shuffle_buffer)

    def _told(self, text: str) -> str:
        for path, url in self._urls.items():
            text = text.replace(path, url)
        return text
