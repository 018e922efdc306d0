"""Reading a configuration file."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from titan_ext.errors import UserError, nearest

_PLACE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|(end of document))\)$")
_TWICE = ("Cannot mutate immutable namespace", "Cannot declare", "Cannot overwrite a value")
"""How what begins a table that is set already is refused."""


def read_file(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, or of a ``config.json`` that a run left.

    Raises:
        UserError: the file is missing, unreadable or not well-formed; one line with file, line and column.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows marks its text files so
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbour(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return _parse_json(path, text) if path.suffix == ".json" else _parse_toml(path, text)


def parse_literal(text: str) -> Any:
    """The value of a TOML literal; None where the text is not one."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return None
    return found["value"] if len(found) == 1 else None


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
    place = _PLACE.search(message)
    line, column = (len(text.splitlines()), 1) if place is None or place.group(3) else place.group(1, 2)
    cure = (
        "; what is set before, by name = … or in a [table], cannot be gone on with: put all of its keys in one [table]"
    )
    message = _PLACE.sub("", message) + (cure if message.startswith(_TWICE) else "")
    raise UserError(f"{path}: line {line}, column {column}: not valid TOML: {message}")


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold one object of sections")
    # A run's config.json also records facts that are not settings.
    return {key: value for key, value in found.items() if key != "resolved"}


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = sorted(each.name for each in path.parent.glob("*.toml"))
    close = nearest(path.name, names)
    return f"; did you mean {path.parent / close}?" if close else ""
