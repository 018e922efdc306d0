"""Real text that any machine with Python has: no network, no file of ours.

``builtin:code`` is the source of Python's standard library; ``builtin:docs`` the prose about it:
docstrings, the language reference that ``help()`` shows, and the descriptions and licences of the
packages that are installed.
"""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from titan_ext.data.corpora.files import CorpusFile
from titan_ext.errors import UserError

_SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ _bundled pydoc_data encodings lib-dynload".split()
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "__hello__", "__phello__", "python-config")
_LARGEST_SOURCE = 256 * 1024
_LARGEST_PROSE = 128 * 1024
_SHORTEST_PROSE = 400


def library_sources() -> list[CorpusFile]:
    """The standard library's modules, sorted; without tests, generated tables and files over 256 KiB.

    Raises:
        UserError: this Python comes without its sources.
    """
    library = sysconfig.get_path("stdlib")
    found = sorted(_sources_below(library))
    if not found:
        raise UserError(f"data = 'builtin:code': no Python sources below {library!r}; give a file or a folder")
    return [CorpusFile(path, "text") for path in found]


def _sources_below(library: str) -> Iterator[Path]:
    # Not Path.rglob: it enters site-packages, which may hold a hundred times as many files.
    for folder, below, names in os.walk(library):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        for name in names:
            if not name.endswith(".py") or name.startswith(_SKIPPED_PREFIXES):
                continue
            path = Path(folder, name)
            if path.is_file() and 0 < path.stat().st_size <= _LARGEST_SOURCE:
                yield path


class Prose:
    """The documents of ``builtin:docs``, taken from their sources as they are read.

    Finding the docstrings of the whole library takes seconds, so a module is parsed when its
    document is first asked for; the text is then kept (a few MB in all).

    Raises:
        UserError: this Python comes without its sources.
    """

    def __init__(self) -> None:
        topics = [_Topic(name) for name in sorted(_topics())]
        modules = [_Docstrings(file.path) for file in library_sources()]
        self._documents: list[_Topic | _Docstrings | _PackageText] = [*topics, *modules, *_package_texts()]

    def __len__(self) -> int:
        return len(self._documents)

    @property
    def size(self) -> int:
        """Bytes of all documents; reads every one of them."""
        return sum(len(self.read(index).encode()) for index in range(len(self)))

    def units(self) -> np.ndarray | None:
        """None: no document is cheaper to read after another."""
        return None

    def files(self) -> list[tuple[Path, int]]:
        """The modules and descriptions, and the bytes of each; the language reference comes with the former."""
        paths = [each.path for each in self._documents if not isinstance(each, _Topic)]
        return [(path, path.stat().st_size) for path in paths]

    @property
    def sources(self) -> list[str]:
        """One: all of it."""
        return ["builtin:docs"]

    def source(self, index: int) -> int:
        """Number of the source of document ``index``."""
        return 0

    def source_numbers(self) -> np.ndarray:
        """``source`` of every document, ``[documents]`` int64."""
        return np.zeros(len(self), np.int64)

    def layout(self) -> np.ndarray:
        """Nothing that the files do not tell."""
        return np.empty(0, np.int64)

    def read(self, index: int) -> str:
        """Text of document ``index``; empty for a module without docstrings."""
        return _text(self._documents[index])


@dataclass(frozen=True, slots=True)
class _Topic:
    name: str

    def text(self) -> str:
        return _topics()[self.name]


@dataclass(frozen=True, slots=True)
class _Docstrings:
    path: Path

    def text(self) -> str:
        try:
            tree = ast.parse(self.path.read_bytes())
        except (SyntaxError, ValueError):
            return ""
        found = "\n\n".join(_docstrings(tree))
        return f"{self.path.stem}\n\n{found}" if len(found) >= _SHORTEST_PROSE else ""


@dataclass(frozen=True, slots=True)
class _PackageText:
    path: Path

    def text(self) -> str:
        return _package_text(self.path)


@cache
def _text(document: _Topic | _Docstrings | _PackageText) -> str:
    return document.text()


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings in the order of the file, each function's and class's under its name."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                yield found if isinstance(node, ast.Module) else f"{node.name}: {found}"
        stack.extend(reversed(list(ast.iter_child_nodes(node))))


@lru_cache(maxsize=1)
def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {name: text for name, text in topics.items() if len(text) >= _SHORTEST_PROSE}


def _package_texts() -> list[_PackageText]:
    """Descriptions and licences of what is installed, each text once: most licences are the same few."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    paths = [library / "LICENSE.txt", *sorted(packages.glob("*.dist-info/METADATA"))]
    paths += sorted(path for path in packages.glob("*.dist-info/**/*") if "licen" in path.name.lower())
    seen: set[bytes] = set()
    found = []
    for path in paths:
        if not path.is_file():
            continue
        text = _package_text(path)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if _SHORTEST_PROSE <= len(text) <= _LARGEST_PROSE and digest not in seen:
            seen.add(digest)
            found.append(_PackageText(path))
    return found


def _package_text(path: Path) -> str:
    text = path.read_bytes().decode("utf-8", errors="replace")
    # METADATA is a message: headers, an empty line, then the description that a person wrote.
    return text.partition("\n\n")[2] if path.name == "METADATA" else text
