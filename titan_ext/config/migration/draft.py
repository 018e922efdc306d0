"""A configuration on its way from an older torchtitan's keys to ours."""

from collections.abc import Iterator, Mapping
from typing import Any

from titan_ext.config.migration.old_format import era_of
from titan_ext.config.migration.result import Migration


class Draft:
    """What is left of the old file, and what there is of the new one.

    Args:
        old: the old tables.
    """

    def __init__(self, old: Mapping[str, Any]) -> None:
        self.old: dict[str, Any] = dict(_leaves(old))
        """Values that have not been dealt with, by dotted key."""

        self.new: dict[str, Any] = {}
        """Ours, by dotted key."""

        self.done = Migration(era=era_of(self.old))
        self.layers: int | None = None
        """Blocks of the model, where they are known."""

    def take(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of these keys that the file has; all of them are dealt with."""
        found = [self.old.pop(key) for key in keys if key in self.old]
        return found[0] if found else default

    def blank(self, key: str, why: str, value: Any = "") -> None:
        """Leave a key of ours to be filled in, at a value that the loader refuses."""
        self.new[key] = value
        self.done.blanks[key] = why


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
