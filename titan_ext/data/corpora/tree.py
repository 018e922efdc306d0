"""Every file that a folder or a glob names, links included, in an order that all machines share."""

import glob
import os
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from titan_ext.error_text import unreadable
from titan_ext.errors import UserError

RESOURCE_FORKS = "__MACOSX"
"""The folder of hidden files that macOS puts into ZIP archives."""


@dataclass(slots=True)
class Tree:
    """What was found."""

    root: Path
    """What names of files are relative to."""
    files: list[Path] = field(default_factory=list)
    """In order: the files of a folder by name, then those of its folders, by name."""
    others: list[Path] = field(default_factory=list)
    """Links to nothing, pipes, devices."""
    hidden: int = 0
    """Names that begin with a dot, and what macOS hides, which were not looked at."""


def walk(folder: Path, name: str) -> Tree:
    """Everything below a folder; links to folders are followed.

    Args:
        folder: where to begin.
        name: what the user called it, for messages.

    Raises:
        UserError: a folder cannot be read, or a link leads to what is there already.
    """
    tree = Tree(folder)
    _descend(str(folder), os.path.realpath(folder), tree, _Once(name))
    return tree


def expand(pattern: Path, name: str) -> Tree:
    """What a glob matches; of a folder that matches, nothing.

    Args:
        pattern: may hold ``**``, for any folders.
        name: what the user called it, for messages.

    Raises:
        UserError: as ``walk``.
    """
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    if "**" in pattern.parts:
        _refuse_circles(str(fixed), name, ())
    # glob itself passes over what it cannot read.
    for folder in glob.glob(str(pattern.parent), recursive=True):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(f"data = {name!r}: the folder {folder!r} cannot be read")
    tree, once = Tree(fixed), _Once(name)
    for match in sorted(glob.glob(str(pattern), recursive=True)):
        path = Path(match)
        if path.is_file():
            once.claim(os.path.realpath(match), match)
            tree.files.append(path)
        elif not path.is_dir():
            tree.others.append(path)
    return tree


def _refuse_circles(folder: str, name: str, above: tuple[str, ...]) -> None:
    """Raises UserError for a link to a folder that it lies in: glob would follow it round and round."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(
            f"data = {name!r}: {folder!r} is a link to a folder that it lies in; take it away, or name the files without **"
        )
    try:
        with os.scandir(folder) as found:
            below = [entry.path for entry in found if _kind(entry) == "folder" and not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error) from error
    for path in below:
        _refuse_circles(path, name, (*above, real))


class _Once:
    """Sees to it that nothing is read twice under two names."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: dict[str, str] = {}

    def claim(self, real: str, path: str) -> None:
        """Raises UserError if ``real``, where ``path`` leads, was claimed by another path."""
        other = self._seen.setdefault(real, path)
        if other != path:
            raise UserError(
                f"data = {self._name!r}: {other!r} and {path!r} are the same, by a link: their documents would be read "
                "twice; take the link away, or name the files with a glob"
            )


def _descend(folder: str, real: str, tree: Tree, once: _Once) -> None:
    once.claim(real, folder)
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(folder, error) from error
    shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name != RESOURCE_FORKS]
    tree.hidden += len(entries) - len(shown)
    folders = []
    for entry in shown:
        kind = _kind(entry)
        target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
        if kind == "folder":
            folders.append((entry.path, target))
        elif kind == "file":
            once.claim(target, entry.path)
            tree.files.append(Path(entry.path))
        else:
            tree.others.append(Path(entry.path))
    for path, target in folders:
        _descend(path, target, tree, once)


def _kind(entry: "os.DirEntry[str]") -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:
        return "other"  # links in a circle
