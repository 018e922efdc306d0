"""The reference of all keys as text: one key, a section, or a Markdown page of everything."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping

from titan_ext.config.reference.collect import TABLES, Key

_HEADING = """\
# Configuration

Every file here is one run: sections of settings, and a `[[site]]` table for each site. What stands in a site's table
(`[site.training]`, `[site.data]` …) counts for that site alone, a flag (`--training.steps 20`) for all. `titan-ext check
FILE.toml` prints what each site comes to, with where every value is from, and lists all mistakes; `titan-ext help KEY`
explains one key.

This page is written by `titan-ext help --markdown`, from the dataclasses: change a key's text there.
"""


def key_text(key: Key, choices: str = "") -> str:
    """One key, for a terminal."""
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    lines = [key.name, *_wrapped(key.text, width), f"  type     {key.type}"]
    lines += [f"  default  {key.default}"] if key.default else ["  default  none: it must be given"]
    lines += [f"  allowed  {choices}"] if choices else []
    lines += [f"  file     {key.file}"]
    if key.torchtitan:
        lines += ["  torchtitan says:", *_wrapped(key.torchtitan, width, "    ")]
    return "\n".join(lines)


def section_text(name: str, purpose: str, keys: Iterable[Key]) -> str:
    """The keys of a section with their defaults, for a terminal."""
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    lines = [f"[[{name}]]  {purpose}" if name in TABLES else f"[{name}]  {purpose}"]
    for key in keys:
        lines.append(f"{key.name} = {key.default}" if key.default else f"{key.name} (must be given)")
        lines += _wrapped(key.text, width)
    return "\n".join(lines)


def overview(purposes: Mapping[str, str]) -> str:
    """All sections, for a terminal."""
    wide = max(map(len, purposes)) + 2
    lines = [f"{name:<{wide}}{purpose}" for name, purpose in purposes.items()]
    return "\n".join([*lines, "", "titan-ext help SECTION lists its keys, titan-ext help KEY explains one."])


def markdown(purposes: Mapping[str, str], keys: Iterable[Key]) -> str:
    """The whole reference as a page."""
    by_section: dict[str, list[Key]] = {name: [] for name in ["", *purposes]}
    for key in keys:
        by_section.setdefault(key.section, []).append(key)
    lines = [_HEADING.rstrip()]
    for name, found in by_section.items():
        if not found:
            continue
        title = "At the top of the file" if not name else f"`[[{name}]]`" if name in TABLES else f"`[{name}]`"
        lines += ["", f"## {title}", ""] + ([purposes[name], ""] if name else [])
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        lines += [_row(key) for key in found]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    cells = (f"`{key.name.rpartition('.')[2]}`", key.type, key.default or "must be given", key.text.replace("``", "`"))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
