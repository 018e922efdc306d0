"""What the user set for one site, merged from every layer, with where each value came from."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from titan_ext.config.findings import Findings, Missing, Need, SettingError
from titan_ext.config.flags import FlagText
from titan_ext.errors import UserError, nearest

UNSET: Any = object()
_PLACE = re.compile(r"\[\d+\]")  # a list is set as a whole


class Origin(StrEnum):
    """Layers of configuration, strongest first."""

    FLAG = "flag"
    SITE = "site"
    FILE = "file"
    PLATFORM = "platform"
    METHOD = "method"
    LAYOUT = "layout"
    TOKENIZER = "tokenizer"
    WEIGHTS = "weights"
    FLAVOR = "flavor"
    TITAN_EXT = "titan_ext"
    TORCHTITAN = "torchtitan"


@dataclass(slots=True)
class Settings:
    """The merged settings of one site.

    ``error`` turns any complaint about a key into the one line that a user reads.
    """

    file: str
    """Path of the TOML file as the user gave it."""

    site: str | None = None
    """Name of the site, once known; None for a file without ``[[site]]``."""

    tree: dict[str, Any] = field(default_factory=dict)
    """Nested tables of plain values."""

    origins: dict[str, Origin] = field(default_factory=dict)
    """Layer of every set leaf by dotted key."""

    findings: Findings | None = None
    """Where ``refuse`` notes complaints; None: it raises them."""

    def merge(self, table: Mapping[str, Any], origin: Origin) -> "Settings":
        """Lay a table over what is there: tables merge, everything else replaces."""
        _merge(self.tree, self.origins, _normalised(table), origin, "")
        return self

    def copy(self) -> "Settings":
        """An independent copy of the tables; leaves are shared."""
        return Settings(self.file, self.site, _copied(self.tree), dict(self.origins), self.findings)

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key, or ``default``."""
        node: Any = self.tree
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    def table(self, key: str) -> Mapping[str, Any]:
        """The table at a key, empty if there is none.

        Raises:
            UserError: there is something else.
        """
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "must be a table", value)
        return value

    def origin(self, key: str) -> Origin | None:
        """The layer that set a key, or something in or above it; None if nobody did."""
        key = _PLACE.sub("", key)
        if key in self.origins:
            return self.origins[key]
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:end]) in self.origins:
                return self.origins[".".join(parts[:end])]
        return next((origin for other, origin in self.origins.items() if other.startswith(key + ".")), None)

    def error(self, key: str, problem: str, value: Any = UNSET) -> SettingError:
        """One line: file, site or flag, full key, value, what is wrong."""
        return SettingError(self._line(key, problem, value), key, self._line(key, problem, value, named=False))

    def missing(self, need: Need, key: str, problem: str, value: Any = UNSET) -> Missing:
        """As ``error``, for what may be right but is not on this machine."""
        return Missing(self._line(key, problem, value), key, need, self._line(key, problem, value, named=False))

    def refuse(self, error: UserError) -> None:
        """Note a complaint, and let the caller go on; raise it where nothing gathers complaints."""
        if self.findings is None:
            raise error
        self.findings.add(error)

    @property
    def doubtful(self) -> set[str]:
        """Keys that have been refused."""
        return set() if self.findings is None else self.findings.doubtful

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let ``refuse`` raise within the block."""
        before, self.findings = self.findings, None
        try:
            yield
        finally:
            self.findings = before

    def _line(self, key: str, problem: str, value: Any, named: bool = True) -> str:
        origin = self.origin(key) if key else None
        if origin is Origin.FLAG:
            place = f"{self.file}: flag --"
        elif named and self.site is not None and origin is not Origin.FILE:
            place = f'{self.file}: site "{self.site}": '
        else:
            place = f"{self.file}: "
        shown = "" if value is UNSET else f" = {show(value)}"
        subject = f"{key}{shown}: " if key else ""
        return one_line(f"{place}{subject}{problem}")


def show(value: Any) -> str:
    """A value as TOML would write it: text in up to 500 characters, since paths are long, and all else in up to 80."""
    value = value.literal() if isinstance(value, FlagText) else value
    text = json.dumps(value, default=str, ensure_ascii=False)
    limit = 500 if isinstance(value, str | Path) else 80
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str) -> str:
    """Text without line breaks or repeated blanks."""
    return " ".join(text.split())


def hint(name: str, allowed: Iterable[str]) -> str:
    """The nearest name, if any is near, and what is allowed."""
    names = [str(each) for each in allowed]
    close = nearest(name, names)
    listed = f"allowed: {', '.join(names)}"
    foreign = next((each for each in name if not each.isascii()), None)
    if close and foreign:
        # It may look like the letter that is meant, or like nothing.
        listed = f"it has a {unicodedata.name(foreign, f'U+{ord(foreign):04X}')} in it; {listed}"
    return f"did you mean {close}? ({listed})" if close else listed


def _normalised(table: Mapping[str, Any]) -> dict[str, Any]:
    """``data = "x"`` is short for ``data = {dataset = "x"}``, ``[[source]]`` for ``[[data.source]]``, at every level."""
    data = table.get("data")
    found = {**table, "data": {"dataset": data}} if isinstance(data, str) else dict(table)
    if "source" in found and isinstance(found.get("data", {}), Mapping):
        found["data"] = {**found.get("data", {}), "source": found.pop("source")}
    return found


def _merge(into: dict, origins: dict[str, Origin], table: Mapping, origin: Origin, prefix: str) -> None:
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        if not isinstance(value, Mapping):
            into[key] = value
            origins[dotted] = origin
            continue
        if not isinstance(into.get(key), dict):
            into[key] = {}
        if not value:
            origins.setdefault(dotted, origin)
        _merge(into[key], origins, value, origin, dotted + ".")


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
