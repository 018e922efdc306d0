"""The comparison as a table for people, and as figures."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from titan_ext.experiments.convergence.outcome import Outcome
from titan_ext.launcher.text import bytes_text, columns, number_text
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes


def rows(found: Iterable[Outcome], sites: int, target: float | None) -> list[dict[str, Any]]:
    """A row of figures for each method.

    Args:
        found: the methods' outcomes.
        sites: how many.
        target: the validation loss whose step is wanted, in nats; None gives no step.
    """
    return [_row(outcome, sites, target) for outcome in found]


def common_target(found: Iterable[Outcome]) -> float | None:
    """The loss that every method reaches: the highest of their last ones; None if all diverged."""
    return max((outcome.loss for outcome in found if isfinite(outcome.loss)), default=None)


def table(figures: Sequence[Mapping[str, Any]], target: float | None) -> list[str]:
    """Lines of the comparison."""
    last = f"steps to {number_text(target, '.4f')}"
    titles = ["method", "lr", "loss", "+-", "perplexity", "sent", "less than DDP", last]
    return columns([titles, *(_cells(row) for row in figures)])


def rates_tried(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines with each method's loss at every learning rate it was tuned over; a dash where it was not."""
    rates = sorted({lr for row in figures for lr in row["grid"]}, key=float)
    body = [[row["label"], *(_tuned(row["grid"], lr) for lr in rates)] for row in figures]
    return columns([["learning rate", *rates], *body])


def _row(outcome: Outcome, sites: int, target: float | None) -> dict[str, Any]:
    steps, parameters = outcome.runs[0].steps[-1], outcome.runs[0].parameters
    every_step = steps * ring_all_reduce_bytes(4 * parameters, sites)
    to_target = outcome.steps_to(target) if target is not None else None
    return {
        "method": outcome.method,
        "label": outcome.label,
        "lr": outcome.lr,
        "loss": _number(outcome.loss, 5),
        "deviation": _number(outcome.deviation, 5),
        "losses": [_number(loss, 5) for loss in outcome.losses],
        "perplexity": _number(outcome.perplexity, 4),
        "bytes_sent": outcome.bytes_sent,
        "less_than_ddp": _number(every_step / outcome.bytes_sent, 2) if outcome.bytes_sent else None,
        "steps_to_target": _number(to_target, 1),
        "grid": {f"{lr:g}": _number(loss, 5) for lr, loss in outcome.grid.items()},
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["label"],
        f"{row['lr']:g}",
        "diverged" if row["loss"] is None else f"{row['loss']:.4f}",
        number_text(row["deviation"], ".4f"),
        number_text(row["perplexity"], ".3f"),
        bytes_text(row["bytes_sent"]),
        number_text(row["less_than_ddp"], ".1f"),
        number_text(row["steps_to_target"], ".0f"),
    ]


def _tuned(grid: Mapping[str, float | None], lr: str) -> str:
    if lr not in grid:
        return "-"
    return "diverged" if grid[lr] is None else f"{grid[lr]:.4f}"


def _number(value: float | None, digits: int) -> float | None:
    """Rounded; None for what JSON cannot hold."""
    return round(value, digits) if value is not None and isfinite(value) else None
