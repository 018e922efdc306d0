"""Documents that are rows of tables, read one group of rows at a time."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titan_ext.data.corpora.unpacked import Stamp, stamp
from titan_ext.error_text import changed, reason, unreadable
from titan_ext.errors import BadRecord, UserError


class TableRows(ABC):
    """The rows of a text column, numbered in the order of files and their groups.

    A group is the least that can be read, so those read last are kept: up to ``keep`` rows, and
    always one group.

    Args:
        paths: the files.
        text_key: name of the column.
        keep: rows to keep.

    Raises:
        UserError: a file is not a table, or has no text column of that name.
    """

    def __init__(self, paths: Sequence[Path], text_key: str, keep: int) -> None:
        self.paths = list(paths)
        self._text_key = text_key
        self._keep = keep
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._groups: list[tuple[int, int]] = []
        self._stamps: list[Stamp] = []
        self.size = 0
        counts: list[int] = []
        for number, path in enumerate(self.paths):
            self._stamps.append(_stamp(path))
            for group, (rows, size) in enumerate(self.groups(path)):
                self._groups.append((number, group))
                counts.append(rows)
                self.size += size
        self._counts = np.array(counts, np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)

    @abstractmethod
    def groups(self, path: Path) -> Iterable[tuple[int, int]]:
        """Rows and bytes of each group of a file.

        Raises:
            UserError: it is not a table, or has no text column.
        """

    @abstractmethod
    def load(self, path: Path, group: int) -> Any:
        """The text column of a group, as an Arrow array.

        Raises:
            BadRecord: the group is damaged.
        """

    def __len__(self) -> int:
        return int(self._first[-1])

    def units(self) -> np.ndarray | None:
        """The group of each row, ``[rows]`` int64: rows of one are cheap to read together."""
        return np.repeat(np.arange(len(self._counts)), self._counts)

    @property
    def empty(self) -> int:
        """Files without a row."""
        groups = zip(self._groups, self._counts, strict=True)
        return len(self.paths) - len({number for (number, _), rows in groups if rows})

    def files(self) -> list[tuple[Path, int]]:
        """The files, and the bytes of each."""
        return [(path, size) for path, (size, _) in zip(self.paths, self._stamps, strict=True)]

    @property
    def sources(self) -> list[str]:
        """Paths of the files."""
        return [str(path) for path in self.paths]

    def source(self, index: int) -> int:
        """Number of the file that holds row ``index``."""
        return self._groups[self._group(index)][0]

    def source_numbers(self) -> np.ndarray:
        """``source`` of every row, ``[rows]`` int64."""
        return np.repeat(np.array([number for number, _ in self._groups], np.int64), self._counts)

    def layout(self) -> np.ndarray:
        """Rows of each group, ``[groups]`` int64: part of what a corpus is known by."""
        return self._counts

    def read(self, index: int) -> str:
        """Text of row ``index``; empty for null.

        Raises:
            BadRecord: it cannot be read.
        """
        group = self._group(index)
        row = index - int(self._first[group])
        column = self._column(group)
        if isinstance(column, BadRecord):
            raise BadRecord(str(column))
        try:
            return column[row].as_py() or ""
        except UnicodeDecodeError as error:
            path = self.paths[self._groups[group][0]]
            raise BadRecord(
                f"data: {str(path)!r}, row {row + 1} of group {self._groups[group][1] + 1}: not UTF-8: {error.reason}"
            ) from None

    def _column(self, group: int) -> Any:
        """The column, or what is wrong with it: a damaged group is not read again for each of its rows."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, within = self._groups[group]
        path = self.paths[number]
        if _stamp(path) != self._stamps[number]:
            raise changed(path)
        try:
            column = self.load(path, within)
        except BadRecord as error:
            column = error
        self._kept[group] = column
        while len(self._kept) > 1 and sum(map(self._rows, self._kept)) > self._keep:
            self._kept.popitem(last=False)
        return column

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _rows(self, group: int) -> int:
        return int(self._counts[group])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}


def check_column(schema: Any, text_key: str, path: Path) -> None:
    """Raises UserError if an Arrow schema has no column of text of that name."""
    import pyarrow

    if text_key not in schema.names:
        raise UserError(f"data: {str(path)!r} has no column {text_key!r} (text_key); its columns are {schema.names}")
    kind = schema.field(text_key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(is_text(kind) for is_text in texts):
        raise UserError(f"data: {str(path)!r}: column {text_key!r} (text_key) holds {kind}, not text")


def damaged(path: Path, group: int, error: Exception) -> Exception:
    """The error to raise where a group cannot be read."""
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(path, error)
    return BadRecord(f"data: {str(path)!r}: group {group + 1} of its rows is damaged: {reason(error)}")


def _stamp(path: Path) -> Stamp:
    try:
        return stamp(path.stat())
    except OSError as error:
        raise unreadable(path, error) from error
