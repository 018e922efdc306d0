"""The format of a file, by its name."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["text", "lines", "json", "csv", "parquet", "arrow"]

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .markdown .rst .tex .org .adoc .html .htm .py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .kt .scala "
    ".js .jsx .ts .tsx .go .rs .rb .php .pl .lua .jl .r .m .swift .cs .hs .ml .clj .ex .erl .sh .sql .css "
    ".toml .yaml .yml .ini .cfg".split()
)
_FORMATS: dict[str, Format] = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "lines"),
    ".json": "json",
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}

ALLOWED = (
    ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, or text (.txt, .md, .rst, .py and other sources); "
    ".gz, .zst, .bz2 or .xz of any but Parquet and Arrow"
)


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path
    format: Format
    compression: str = ""
    """One of the values of ``COMPRESSIONS``; empty for none."""

    @property
    def unpacked_name(self) -> str:
        """Its path without the ending of the compression."""
        return os.path.splitext(self.path)[0] if self.compression else str(self.path)


def classify(path: Path) -> CorpusFile | None:
    """The file with its format, by its name's ending; None for an ending that is not known."""
    inner, packed = _endings(path.name)
    found = _FORMATS.get(inner)
    if found is None or (packed and found in ("parquet", "arrow")):
        return None
    return CorpusFile(path, found, COMPRESSIONS.get(packed, ""))


def ending(path: Path) -> str:
    """The part of a name that says what the file is: ``.jsonl.zst``, ``.png``, or "without an ending"."""
    return "".join(_endings(path.name)) or "without an ending"


def count_endings(paths: Iterable[Path]) -> Counter[str]:
    """How many files have each ``ending``."""
    return Counter(map(ending, paths))


def _endings(name: str) -> tuple[str, str]:
    """The ending that says what a file holds, and that of its compression; both may be empty."""
    stem, last = os.path.splitext(name.lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSIONS else (last, "")
