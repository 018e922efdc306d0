"""Documents that are rows of Parquet files, read one row group at a time."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titan_ext.error_text import reason
from titan_ext.errors import UserError


class ParquetRows:
    """The rows of a text column, numbered in the order of files and row groups.

    A row group is the least that can be read, so those read last are kept: up to ``keep`` rows, and
    always one group.

    Raises:
        UserError: a file is not Parquet, or has no text column of that name.
    """

    def __init__(self, paths: Sequence[Path], text_key: str, keep: int) -> None:
        self._paths = list(paths)
        self._text_key = text_key
        self._keep = keep
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._groups: list[tuple[int, int]] = []
        self.size = 0
        counts: list[int] = []
        for number, path in enumerate(self._paths):
            metadata = _open(path, text_key).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                counts.append(metadata.row_group(group).num_rows)
                self.size += _column_bytes(metadata.row_group(group), text_key)
        self._counts = np.array(counts, np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def units(self) -> np.ndarray | None:
        """The row group of each row, ``[rows]`` int64: rows of one are cheap to read together."""
        return np.repeat(np.arange(len(self._counts)), self._counts)

    def read(self, index: int) -> str:
        """Text of row ``index``; empty for null."""
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._column(group)[index - int(self._first[group])].as_py() or ""

    def _column(self, group: int) -> Any:
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, within = self._groups[group]
        column = _open(self._paths[number], self._text_key).read_row_group(within, columns=[self._text_key]).column(0)
        self._kept[group] = column
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > self._keep:
            self._kept.popitem(last=False)
        return column

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}


def _open(path: Path, text_key: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data: cannot read {str(path)!r} as Parquet: {reason(error)}") from error
    schema = file.schema_arrow
    if text_key not in schema.names:
        raise UserError(f"data: {str(path)!r} has no column {text_key!r} (text_key); its columns are {schema.names}")
    kind = schema.field(text_key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"data: {str(path)!r}: column {text_key!r} (text_key) holds {kind}, not text")
    return file


def _column_bytes(group: Any, text_key: str) -> int:
    """Uncompressed bytes of the text column in a row group, as its metadata states them."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
