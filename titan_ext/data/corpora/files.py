"""Which files a corpus names, and the format of each."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from titan_ext.errors import UserError

Format = Literal["text", "lines", "parquet"]

TEXT_SUFFIXES = frozenset(
    ".txt .md .markdown .rst .tex .org .adoc .html .htm .py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .kt .scala "
    ".js .jsx .ts .tsx .go .rs .rb .php .pl .lua .jl .r .m .swift .cs .hs .ml .clj .ex .erl .sh .sql .css "
    ".toml .yaml .yml .ini .cfg".split()
)
LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})

ALLOWED = ".jsonl, .ndjson, .parquet, or text (.txt, .md, .rst, .py and other sources); .gz of any but Parquet"


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path
    format: Format
    gzipped: bool = False


def classify(path: Path) -> CorpusFile | None:
    """The file with its format, by its name's ending; None for an ending that is not known."""
    name = path.name.lower()
    gzipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in TEXT_SUFFIXES:
        return CorpusFile(path, "text", gzipped)
    if suffix in LINES_SUFFIXES:
        return CorpusFile(path, "lines", gzipped)
    if suffix in PARQUET_SUFFIXES and not gzipped:
        return CorpusFile(path, "parquet")
    return None


def find_files(spec: str) -> list[CorpusFile]:
    """The files that a path, a folder (recursively) or a glob pattern names, in sorted order.

    Hidden files, and files of a folder whose format is not known, are passed over.

    Raises:
        UserError: nothing is there, or nothing there has a known format.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _known(_walk(path), spec)
    if path.exists():
        return [_named(path)]
    if glob.has_magic(spec):
        return _known(_expand(str(path)), spec)
    raise UserError(f"data = {spec!r}: no such file or folder{_hint(spec, path)}")


def _named(path: Path) -> CorpusFile:
    if not path.is_file():
        raise UserError(f"data = {str(path)!r}: neither a file nor a folder")
    found = classify(path)
    if found is None:
        raise UserError(f"data = {str(path)!r}: unknown format {path.suffix!r}; allowed: {ALLOWED}")
    return found


def _known(paths: Iterator[Path], spec: str) -> list[CorpusFile]:
    found = [file for file in map(classify, paths) if file is not None]
    if not found:
        raise UserError(f"data = {spec!r}: no file of a known format there; allowed: {ALLOWED}")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        # In place, so that os.walk itself descends in this order and not into hidden folders:
        # every machine that holds a copy must number the documents alike.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name)


def _expand(pattern: str) -> Iterator[Path]:
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match)
        # "**" names a folder and also everything in it, so only files count.
        if path.is_file():
            yield path


def _hint(spec: str, path: Path) -> str:
    parent = path.parent
    if parent.is_dir():
        close = get_close_matches(path.name, os.listdir(parent), n=1)
        if close:
            return f"; did you mean {str(parent / close[0])!r}?"
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and classify(path) is None:
        return f"; for a Hugging Face dataset write 'hf:{spec}'"
    return "; allowed: a file, a folder, a glob, 'builtin:code', 'builtin:docs' or 'hf:NAME'"
