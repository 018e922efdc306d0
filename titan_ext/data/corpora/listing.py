"""What a corpus reads of what is there, and what it does not: found without reading it."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from titan_ext.data.corpora.contents import documents_of
from titan_ext.data.corpora.files import ALLOWED, CorpusFile, classify, count_endings, ending
from titan_ext.data.corpora.fingerprint import digest_of_files
from titan_ext.data.corpora.records import shows_key
from titan_ext.data.corpora.signature import HEAD_BYTES, encoding_of, head_problem, is_lfs_pointer
from titan_ext.data.corpora.splits import choose_split, held_back
from titan_ext.data.corpora.tree import Tree, expand, walk
from titan_ext.data.order import Split
from titan_ext.data.remote.files import list_tree, with_urls
from titan_ext.error_text import renamed, unreadable
from titan_ext.errors import UserError, nearest
from titan_ext.object_store import is_url

_MOST_LOOKED_AT = 1000
"""Files whose beginning is looked at before training, evenly spread over the corpus: opening a million takes long."""
_MOST_FETCHED = 16
"""The same, of files behind a URL."""
_MOST_KINDS = 8
_SHARD = re.compile(r"(\d+)-of-(\d+)")


@dataclass(slots=True)
class Listing:
    """The files of a corpus."""

    name: str
    """What the user calls it."""
    files: list[CorpusFile] = field(default_factory=list)
    """Those that are read, in order."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Those that are not, by ending and why."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        read = [f"reads {_kinds(count_endings([file.path for file in self.files]))}"] if self.files else []
        left = [f"not read: {_kinds(self.left_out)}"] if self.left_out else []
        return f"{self.name}: {'; '.join([*read, *left, *self.notes])}"


class NotThere(UserError):
    """No file of that name is on this machine."""


def list_files(
    name: str,
    *,
    text_key: str = "text",
    split: Split = "auto",
    holdout_fraction: float = 0.0,
    tolerant: bool = False,
    retry_seconds: float = 0.0,
) -> Listing:
    """The files that a path, a folder (recursively), a glob pattern or a URL names, in sorted order.

    Hidden files, files whose format is not known and what is no document are passed over and counted.

    Args:
        name: the path, folder or pattern, as the user gave it.
        text_key: key or column of the text.
        split: which files to take where their names say of which split they are.
        holdout_fraction: as in the loader's config.
        tolerant: whether what cannot be read as text is left out later, one by one.
        retry_seconds: how long the server of a URL may be away.

    Raises:
        NotThere: nothing has that name.
        UserError: what is there cannot be meant, or cannot be read.
        ReadError: a server is away.
    """
    try:
        tree = list_tree(name, retry_seconds) if is_url(name) else _local_tree(name)
        is_single = tree.files == [tree.root]
        found = Listing(name, [_known(tree.files[0])]) if is_single else _of_tree(tree, name, text_key)
        root = Path() if is_single else tree.root
        found.files, others = choose_split(found.files, root, split, holdout_fraction, name)
        found.left_out += others
        # Who names one file means it.
        if split in ("auto", "train") and not is_single and (word := held_back(found.files, root)):
            found.notes.append(f"all of it is called {word} data")
        found.notes += _look_at(found.files, tolerant, _MOST_FETCHED if is_url(name) else _MOST_LOOKED_AT)
        found.notes += ([] if is_url(name) else _copies(found.files)) + _gaps(found.files)
    except UserError as error:
        if not is_url(name):
            raise
        raise renamed(error, with_urls) from None
    return found


def _local_tree(name: str) -> Tree:
    path = Path(name).expanduser()
    if path.is_dir():
        return walk(path, name)
    if path.exists():
        if not path.is_file():
            raise UserError(f"data = {str(path)!r}: neither a file nor a folder")
        return Tree(path, [path])
    if glob.has_magic(name):
        return expand(path, name)
    raise NotThere(f"data = {name!r}: no such file or folder{_hint(name, path)}")


def _of_tree(tree: Tree, name: str, text_key: str) -> Listing:
    known = {path: file for path in tree.files if (file := classify(path)) is not None}
    broken = next((path for path in tree.others if classify(path) is not None), None)
    if broken is not None:
        what = "a link to nothing" if broken.is_symlink() else "neither a file nor a folder"
        raise UserError(f"data = {name!r}: {str(broken)!r} is {what}")
    _refuse_twins(known.values(), name)
    unknown = [path for path in tree.files if path not in known]
    found = documents_of(list(known.values()), unknown, tree.root, name, partial(shows_key, key=text_key))
    left_out = found.left_out + Counter({"hidden": tree.hidden, "links to nothing": len(tree.others)})
    return Listing(name, found.files, left_out)


def _refuse_twins(files: Iterable[CorpusFile], name: str) -> None:
    """The same documents packed and unpacked would be read twice."""
    seen: dict[str, CorpusFile] = {}
    for file in files:
        other = seen.setdefault(file.unpacked_name, file)
        if other is not file:
            raise UserError(
                f"data = {name!r}: {str(other.path)!r} and {file.path.name!r} are one file, packed and unpacked: its "
                "documents would be read twice; take one away, or name the files with a glob"
            )


def _look_at(files: Sequence[CorpusFile], tolerant: bool, most: int) -> list[str]:
    """Refuse what is no text by its first bytes; what is worth a note."""
    encodings: Counter[str] = Counter()
    step = max(1, -(-len(files) // most))
    for file in files[::step]:
        head = _head(file.path)
        if is_lfs_pointer(head):
            raise UserError(
                f"data: {str(file.path)!r} is a Git LFS pointer, not the file itself; run 'git lfs pull' where it was "
                "cloned"
            )
        if file.compression or file.format in ("parquet", "arrow"):
            continue
        encodings[encoding_of(head)] += 1
        problem = head_problem(head)
        # A bad line of JSON, which may not be the first, is known when it is read.
        if problem and not tolerant and (file.format == "text" or "NUL" in problem):
            raise UserError(f"data: {str(file.path)!r}: {problem}")
    return [f"{count} in {kind.upper()}, decoded" for kind, count in encodings.items() if kind != "utf-8"]


def _copies(files: Sequence[CorpusFile]) -> list[str]:
    """A note on files that hold the same as others, which somebody may have copied by mistake."""
    sizes = {file.path: _size(file.path) for file in files}
    alike = Counter(sizes.values())
    candidates = [path for path, size in sizes.items() if size and alike[size] > 1][:_MOST_LOOKED_AT]
    heads = {path: (sizes[path], _head(path)) for path in candidates}
    alike_so_far = Counter(heads.values())
    first: dict[bytes, Path] = {}
    copies = []
    for path, head in heads.items():
        if alike_so_far[head] > 1:
            other = first.setdefault(digest_of_files([(path, sizes[path])]), path)
            copies += [f"{path.name!r} holds the same as {other.name!r}"] if other is not path else []
    more = f", {len(copies) - 1} more likewise" if len(copies) > 1 else ""
    return [f"{copies[0]}{more}: read twice"] if copies else []


def _gaps(files: Sequence[CorpusFile]) -> list[str]:
    """A note on shards whose names say that there are more of them, as ``train-00002-of-00004.parquet`` does."""
    shards: dict[tuple[str, ...], set[int]] = {}
    for file in files:
        if match := _SHARD.search(file.path.name):
            around = (str(file.path.parent), file.path.name[: match.start()], match[2], file.path.name[match.end() :])
            shards.setdefault(around, set()).add(int(match[1]))
    short = [(before, count, len(there)) for (_, before, count, _), there in shards.items() if len(there) < int(count)]
    return [
        f"of the {int(count)} shards {f'{before}*-of-{count}'!r} only {there} are there"
        for before, count, there in short
    ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error


def _known(path: Path) -> CorpusFile:
    found = classify(path)
    if found is None:
        raise UserError(f"data = {str(path)!r}: unknown format {ending(path)!r}; allowed: {ALLOWED}")
    return found


def _kinds(counts: Counter[str]) -> str:
    # A file that is named needs no count.
    listed = [
        kind if count == 1 and kind[0] not in "." and kind.endswith(")") else f"{count} {kind}"
        for kind, count in counts.most_common()
    ]
    if len(listed) <= _MOST_KINDS:
        return ", ".join(listed)
    rest = sum(count for _, count in counts.most_common()[_MOST_KINDS:])
    return ", ".join([*listed[:_MOST_KINDS], f"{rest} others"])


def _hint(name: str, path: Path) -> str:
    parent = path.parent
    if parent.is_dir():
        close = nearest(path.name, os.listdir(parent))
        if close:
            return f"; did you mean {str(parent / close)!r}?"
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and classify(path) is None:
        return f"; for a Hugging Face dataset write 'hf:{name}'"
    return "; allowed: a file, a folder, a glob, a URL, 'builtin:code', 'builtin:docs' or 'hf:NAME'"
