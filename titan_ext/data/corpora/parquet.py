"""Documents that are rows of Parquet files, read one row group at a time."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_ext.data.corpora.rows import TableRows, check_column, damaged
from titan_ext.error_text import reason, unreadable
from titan_ext.errors import UserError


class ParquetRows(TableRows):
    """The rows of a text column of Parquet files; a group is a row group."""

    def groups(self, path: Path) -> Iterable[tuple[int, int]]:
        """Rows and bytes of the text column of each row group."""
        metadata = _open(path, self._text_key).metadata
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        return [(group.num_rows, _column_bytes(group, self._text_key)) for group in groups]

    def load(self, path: Path, group: int) -> Any:
        """The text column of a row group."""
        import pyarrow

        file = _open(path, self._text_key)
        try:
            return file.read_row_group(group, columns=[self._text_key]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(path, group, error) from error


def _open(path: Path, text_key: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from error
        raise UserError(f"data: cannot read {str(path)!r} as Parquet: {reason(error)}") from error
    check_column(file.schema_arrow, text_key, path)
    return file


def _column_bytes(group: Any, text_key: str) -> int:
    """Uncompressed bytes of the text column in a row group, as its metadata states them."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
