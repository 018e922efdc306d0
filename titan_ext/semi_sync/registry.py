"""Names in a configuration and what they stand for: methods, codecs, aggregations, outer optimizers."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from titan_ext.errors import InvalidValue, one_of

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries of one kind by name; each registers itself where it is defined.

    Args:
        key: the configuration key whose values are the names, such as ``"codec"``.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> Entry:
        """Make ``name`` stand for ``entry``, which is returned.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.key} {name!r} is already registered")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorate an entry, so that ``name`` stands for it.

        Raises:
            ValueError: the name is taken.
        """
        return lambda entry: self.add(name, entry)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def items(self) -> list[tuple[str, Entry]]:
        """All names, sorted, and what they stand for."""
        return sorted(self._entries.items(), key=lambda item: item[0])

    def get(self, name: str) -> Entry:
        """What a name stands for. A dotted name is a module's path and a name that importing the module registers.

        Raises:
            ValueError: naming the key, the unknown name and those that there are.
        """
        return self._entries[self.resolve(name)]

    def resolve(self, name: str) -> str:
        """The registered name: the last part of a dotted one, whose module is imported first.

        Raises:
            ValueError: as ``get``.
        """
        path, _, last = name.rpartition(".")
        if path and last not in self._entries:
            self._load(name, path)
        if last not in self._entries:
            problem = f"importing {path} registers no {self.key} {last!r}" if path else one_of(name, self.names())
            raise InvalidValue(self.key, name, problem)
        return last

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Forget, at the end, what was registered meanwhile: for tests."""
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries = before

    def _load(self, name: str, path: str) -> None:
        """Import ``package.module`` of ``package.module.name``, or ``package.name`` where that is a module."""
        for candidate in (name, path):
            try:
                importlib.import_module(candidate)
                return
            except ModuleNotFoundError as error:
                # A module that exists and imports what does not is the user's to mend.
                if error.name is None or not (candidate == error.name or candidate.startswith(f"{error.name}.")):
                    raise InvalidValue(self.key, name, f"cannot be imported: {error}") from None
        raise InvalidValue(self.key, name, f"no module {path!r} can be imported")
