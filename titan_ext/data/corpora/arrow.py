"""Documents that are rows of Arrow files (IPC, Feather) and streams, as Hugging Face's datasets library keeps them."""

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from titan_ext.data.corpora.rows import TableRows, check_column, damaged
from titan_ext.error_text import reason, unreadable
from titan_ext.errors import UserError

_FILE_MAGIC = b"ARROW1"
_OLD_FEATHER_MAGIC = b"FEA1"


class ArrowRows(TableRows):
    """The rows of a text column of Arrow files; a group is a record batch."""

    @cached_property
    def _batches(self) -> "Callable[[Path], _Batches]":
        # Each holds its file open, of which a process may have few.
        return lru_cache(maxsize=64)(_Batches)

    def groups(self, path: Path) -> Iterable[tuple[int, int]]:
        """Rows and bytes of the text column of each record batch."""
        batches = self._batches(path)
        columns = (batches.column(group, self._text_key) for group in range(batches.count))
        return [(len(column), column.nbytes) for column in columns]

    def load(self, path: Path, group: int) -> Any:
        """The text column of a record batch."""
        return self._batches(path).column(group, self._text_key)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_batches"}


class _Batches:
    """The record batches of an open file."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._path = path
        try:
            magic = path.open("rb").read(len(_FILE_MAGIC))
            source = pyarrow.memory_map(str(path))
            self._file = pyarrow.ipc.open_file(source) if magic == _FILE_MAGIC else None
            # A stream has no list of its batches. To read them maps them, and copies only what is compressed.
            self._read = [] if self._file else pyarrow.ipc.open_stream(source).read_all().to_batches()
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(path, error) from error
            old = "; Feather of version 1 is not read, write it anew" if magic.startswith(_OLD_FEATHER_MAGIC) else ""
            raise UserError(f"data: cannot read {str(path)!r} as Arrow: {reason(error)}{old}") from error
        self.count = self._file.num_record_batches if self._file else len(self._read)

    def column(self, group: int, text_key: str) -> Any:
        import pyarrow

        try:
            batch = self._file.get_batch(group) if self._file else self._read[group]
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(self._path, group, error) from error
        check_column(batch.schema, text_key, self._path)
        return batch.column(text_key)
