"""Flags of the command line: ``--section.key value``, the strongest layer."""

import re
from collections.abc import Sequence
from typing import Any

from titan_ext.config.source import parse_literal
from titan_ext.errors import UserError

_FLAG = re.compile(r"^--([A-Za-z_][A-Za-z0-9_.-]*)(?:=(.*))?$", re.DOTALL)


class FlagText(str):
    """The text of a flag: what it means depends on the type of the key it sets."""

    bare: bool = False
    """Whether the flag came without a value (``--compile.enable``)."""

    @classmethod
    def without_value(cls) -> "FlagText":
        """The value of a flag that came without one."""
        text = cls("true")
        text.bare = True
        return text

    def literal(self) -> Any:
        """The text as a TOML value; the text itself where it is none."""
        found = parse_literal(self)
        return str(self) if found is None else found


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """``--a.b value``, ``--a.b=value`` and ``--a.b`` as nested tables whose leaves are ``FlagText``.

    Raises:
        UserError: an argument is not of that form.
    """
    tree: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        match = _FLAG.match(argument)
        if match is None:
            problem = f"unexpected argument {argument!r}; settings are given as --section.key value"
            raise UserError(f"command line: {problem}")
        key, text = match.group(1).replace("-", "_"), match.group(2)
        position += 1
        if text is None and position < len(arguments) and not arguments[position].startswith("--"):
            text = arguments[position]
            position += 1
        _put(tree, key, FlagText.without_value() if text is None else FlagText(text))
    return tree


def _put(tree: dict[str, Any], key: str, value: FlagText) -> None:
    *path, last = key.split(".")
    if path[:1] == ["site"]:
        raise UserError(
            f"command line: --{key}: a flag cannot choose a site's table; it applies to every site that is loaded"
            f" (choose one with --site NAME), so give --{'.'.join([*path[1:], last])}"
        )
    for part in path:
        node = tree.setdefault(part, {})
        if not isinstance(node, dict):
            node = tree[part] = {"dataset": node} if part == "data" else {}
        tree = node
    if last == "data" and isinstance(tree.get(last), dict):
        tree[last]["dataset"] = value
    else:
        tree[last] = value
