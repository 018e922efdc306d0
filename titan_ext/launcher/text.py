"""Numbers and columns as people read them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def number_text(value: float | None, form: str) -> str:
    """The number in that form; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, float) and form.endswith("d"):
        value = round(value) if math.isfinite(value) else 0
    return format(value, form)


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units, as the speed of a link is given: ``12.3 MB``."""
    if value is None:
        return "-"
    size, units = float(value), ["B", "kB", "MB", "GB", "TB"]
    while abs(size) >= 999.95 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def duration_text(seconds: float) -> str:
    """``12.3 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds < 59.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")


def step_text(record: Mapping[str, Any], total: int) -> str:
    """``step  12/120  loss 4.1234  9,123 tokens/s  lr 1.00e-03``."""
    width = len(str(total))
    return "  ".join(
        [
            f"step {record.get('step', 0):>{width}}/{total}",
            f"loss {loss_text(record):>7}",
            f"{number_text(record.get('tokens_per_second'), ',.0f'):>7} tokens/s",
            f"lr {number_text(record.get('lr'), '.2e')}",
        ]
    )


def round_text(record: Mapping[str, Any]) -> str:
    """``round 2 at step 20: 2 sites, 1.2 MB sent, 1.2 MB received, 0.52 s``."""
    of_region = record.get("level") == "region"
    if not record.get("committed", True):
        reason = record.get("error") or "no reason given"
        return f"{'region' if of_region else 'round'} at step {record.get('step')} not committed: {reason}"
    count = record.get("participants", 0)
    name = "region" if of_region else f"round {record.get('round')}"
    return (
        f"{name} at step {record.get('step')}: {count} {'site' if count == 1 else 'sites'}, "
        f"{bytes_text(record.get('bytes_sent'))} sent, {bytes_text(record.get('bytes_received'))} received, "
        f"{round_seconds(record):.2f} s"
    )


def left_text(record: Mapping[str, Any]) -> str:
    """``left after step 21, which is saved``."""
    return f"left after step {record.get('step')}, which is {'saved' if record.get('saved') else 'NOT saved'}"


def ended_text(record: Mapping[str, Any]) -> str:
    """``the data ended after step 49``."""
    return f"the data ended after step {record.get('step')}"


def round_seconds(record: Mapping[str, Any]) -> float:
    """Seconds a round took: waiting, reducing and applying."""
    return sum(record.get(f"seconds_{part}") or 0.0 for part in ("quorum", "reduce", "apply"))


def loss_text(record: Mapping[str, Any]) -> str:
    """The loss of a step; a loss that is no number is written as null and shown as nan."""
    return "nan" if record.get("loss") is None else f"{record['loss']:.4f}"


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of cells as lines: the first ``left`` columns to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
