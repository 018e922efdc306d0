"""The texts of a table in CSV (RFC 4180, with a line of names) or in tab-separated values."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from titan_ext.data.corpora.files import CorpusFile
from titan_ext.error_text import reason
from titan_ext.errors import UserError

_BLOCK_BYTES = 1 << 24
_LONGEST_ROW_BYTES = 1 << 30
_STRADDLES = "straddl"
"""The word by which Arrow says that a row is longer than a block."""


def csv_texts(
    data: memoryview, file: CorpusFile, text_key: str, broken: list[str] | None
) -> Iterator[tuple[memoryview, np.ndarray]]:
    """The column of the text, in blocks: bytes of UTF-8, and where each row's begin, ``[rows + 1]`` int64.

    Args:
        data: the table.
        file: whose it is.
        text_key: name of the column.
        broken: is given what is wrong with each row of too many or too few columns, which is then left out; None: such
            a row is an error.

    Raises:
        UserError: there is no such column, a row is broken or longer than 1 GiB, or it is not UTF-8.
    """
    import pyarrow

    where = f"data: {str(file.path)!r}"
    rows, block = 0, _BLOCK_BYTES
    found: list[str] | None = None
    while len(data):
        found = None if broken is None else []
        try:
            for texts in _batches(data, file, text_key, block, found, skip=rows):
                rows += len(texts)
                yield _buffers(texts)
            break
        except pyarrow.ArrowKeyError:
            raise UserError(
                f"{where}: no column {text_key!r} (text_key); its columns are {_names(data, file)}"
            ) from None
        except pyarrow.ArrowInvalid as error:
            if _STRADDLES not in str(error) or block >= _LONGEST_ROW_BYTES:
                raise UserError(f"{where}: cannot read it as CSV: {reason(error)}{_cure(str(error))}") from None
            block *= 8
    if broken is not None:
        broken += [f"{where}: {problem}" for problem in found or []]


def _batches(
    data: memoryview, file: CorpusFile, text_key: str, block: int, broken: list[str] | None, skip: int
) -> Iterator[Any]:
    """Arrays of the texts, without the first ``skip`` rows."""
    import pyarrow
    from pyarrow import csv

    def leave_out(row: Any) -> str:
        broken.append(f"a row of {row.actual_columns} columns, not {row.expected_columns}: {(row.text or '')[:80]!r}")
        return "skip"

    reader = csv.open_csv(
        pyarrow.py_buffer(data),
        read_options=csv.ReadOptions(block_size=block, use_threads=False),
        parse_options=csv.ParseOptions(
            delimiter=_delimiter(file),
            newlines_in_values=True,
            invalid_row_handler=None if broken is None else leave_out,
        ),
        convert_options=csv.ConvertOptions(
            include_columns=[text_key], column_types={text_key: pyarrow.string()}, strings_can_be_null=False
        ),
    )
    for batch in reader:
        left = batch.column(0)[skip:]
        skip -= min(skip, len(batch))
        if len(left):
            yield left


def _buffers(texts: Any) -> tuple[memoryview, np.ndarray]:
    _, offsets, data = texts.buffers()
    places = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    held = memoryview(b"" if data is None else data)[places[0] : places[-1]]
    return held, places - places[0]


def _delimiter(file: CorpusFile) -> str:
    return "\t" if file.unpacked_name.lower().endswith(".tsv") else ","


def _names(data: memoryview, file: CorpusFile) -> list[str]:
    first = bytes(data[:_BLOCK_BYTES]).removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode(errors="replace")
    return [name.strip().strip('"') for name in first.split(_delimiter(file))]


def _cure(message: str) -> str:
    if "UTF8" in message:
        return "; convert it (iconv -f LATIN1 -t UTF-8)"
    return "; data.on_bad_record = 'skip' leaves such rows out" if "columns" in message else ""
