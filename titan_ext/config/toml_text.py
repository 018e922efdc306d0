"""Values and tables as TOML."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any


def toml_value(value: Any) -> str:
    """A value in TOML's spelling; None as "none", which every key that may be unset reads as that."""
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {toml_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def toml_tables(tree: Mapping[str, Any], comments: Mapping[str, str], prefix: str = "") -> Iterable[str]:
    """The lines of nested tables: first what is no table, then each table under its header.

    Args:
        tree: the tables.
        comments: by dotted key, put behind its line.
        prefix: dotted key of ``tree``.
    """
    tables = {key: value for key, value in tree.items() if isinstance(value, Mapping)}
    for key, value in tree.items():
        if key not in tables:
            comment = comments.get(f"{prefix}{key}", "")
            yield f"{_key(key)} = {toml_value(value)}" + (f"  # {comment}" if comment else "")
    for key, table in tables.items():
        yield ""
        if any(not isinstance(value, Mapping) for value in table.values()) or not table:
            yield f"[{prefix}{_key(key)}]"
        yield from toml_tables(table, comments, f"{prefix}{key}.")


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)
