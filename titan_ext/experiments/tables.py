"""Figures of records as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def markdown(titles: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in body)
    return [
        f"| {' | '.join(titles)} |",
        f"|{' --- |' * len(titles)}",
        *(f"| {' | '.join(row)} |" for row in escaped),
    ]


def interval(row: Mapping[str, Any], key: str) -> str:
    """A figure with the half width that stands beside it; None of it is a run that diverged."""
    if row[key] is None:
        return "diverged"
    half = row[f"{key}_half_width"]
    return f"{row[key]:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def text_of(value: Any) -> str:
    """A number or a word of a record."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
