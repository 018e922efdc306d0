"""Write the pages of results anew from the records: the README of titan_ext/experiments/results, and README.md's table.

Each number on them stands in a record, a JSON file that ``titan-ext bench NAME --record`` has written; run this after it.
With --check nothing is written, and pages that do not say what the records do are an error.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_ext.errors import UserError
from titan_ext.experiments.records import RESULTS, Record, read
from titan_ext.experiments.summary import readme_lines
from titan_ext.experiments.tables import interval, markdown, text_of

HELP = "write the pages of results anew from what --record has kept"

_BEGIN, _END = "<!-- results: titan-ext bench results -->", "<!-- end of results -->"
_ROOT = Path(__file__).parents[2]
_HEAD = """\
# Results

Written by `titan-ext bench results` from the JSON files beside it. Each is what the named command printed, run with
`--record` on the named machine; intervals are 95%, by Student's t over seeds. A claim that does not hold says so.
"""
_NO_COLUMNS = ("part", "arm", "method", "variant")
"""What a table leaves out: it is in the heading, or in the label."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whether to write."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page is not as it would be written"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the pages; returns their names.

    Raises:
        UserError: a record cannot be read, or, with ``--check``, a page is not what the records say.
    """
    records = read()
    wanted = {RESULTS / "README.md": page(records)}
    readme = _ROOT / "README.md"
    if readme.exists():  # of an installed package there is none
        wanted[readme] = with_table(readme.read_text(encoding="utf-8"), records)
    for path, text in wanted.items():
        if options.check and not (path.exists() and path.read_text(encoding="utf-8") == text):
            raise UserError(f"{path}: differs from the records; run titan-ext bench results")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return {"pages": [path.name for path in wanted], "records": list(records)}


def page(records: Mapping[str, Record]) -> str:
    """The page of results, as Markdown."""
    return "\n".join([_HEAD, *(line for name, record in records.items() for line in _section(name, record))])


def with_table(readme: str, records: Mapping[str, Record]) -> str:
    """README.md with the tables of results of the records between its two marks.

    Raises:
        UserError: a mark is missing.
    """
    before, mark, rest = readme.partition(f"{_BEGIN}\n")
    _, end, after = rest.partition(_END)
    if not (mark and end):
        raise UserError(f"README.md: {_BEGIN} or {_END} is missing")
    return f"{before}{mark}{_joined(readme_lines(records))}{end}{after}"


def _joined(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _section(name: str, record: Record) -> Iterable[str]:
    figures, machine = record.figures, record.machine
    yield f"\n## {name}\n"
    yield f"```bash\n{record.command}\n```\n"
    seeds = f", {figures['seeds']} seed(s)" if "seeds" in figures else ""
    yield (
        f"Version {record.version}, commit {record.commit or 'unknown'}; {machine['cores']} core(s), {machine['device']}{seeds}."
    )
    settings = {key: value for key, value in figures.items() if isinstance(value, int | float | str)}
    yield "\n" + ", ".join(f"`{key}` {text_of(value)}" for key, value in settings.items()) + "."
    rows, parts = figures.get("rows", []), figures.get("hypotheses", {})
    for part, hypothesis in parts.items():
        yield f"\n### {part}\n\n{hypothesis}\n"
        yield from _rows([row for row in rows if row["part"] == part])
        yield from _claims([each for each in figures["claims"] if each["claim"].startswith(f"{part}, ")])
    if not parts:
        yield ""
        yield from _rows(rows)
        yield from _claims(figures.get("claims", []))


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of what is a number or a word in the rows; half widths stand beside their figure."""
    if not rows:
        return []
    named = "label" in rows[0]
    keys = [
        key
        for key in rows[0]
        if not (named and key in _NO_COLUMNS)
        and not key.endswith("_half_width")
        and not any(isinstance(row.get(key), list | dict) for row in rows)
    ]
    keys = [key for key in keys if any(row.get(key) is not None for row in rows)]
    keys.sort(key=lambda key: key != "label")
    body = [
        [interval(row, key) if f"{key}_half_width" in row else text_of(row.get(key)) for key in keys] for row in rows
    ]
    return markdown([key.replace("_", " ") for key in keys], body)


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    if not claims:
        return []
    body = [[each["claim"], "holds" if each["holds"] else "does NOT hold", each["figures"]] for each in claims]
    return ["", *markdown(["expected", "came out", "figures"], body)]
