"""The comparison as figures, as tables and as a plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_ext.experiments.convergence.outcome import Outcome
from titan_ext.experiments.plots import draw_curves
from titan_ext.experiments.report import grid_figures, number
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


def table(figures: Sequence[Mapping[str, Any]], target: float | None) -> list[str]:
    """Lines of the comparison."""
    last = f"steps to {number_text(target, '.4f')}"
    titles = ["method", "lr", "loss", "+-", "perplexity", "sent", "less than DDP", last]
    return columns([titles, *(_cells(row) for row in figures)])


def _row(outcome: Outcome, sites: int, target: float | None) -> dict[str, Any]:
    steps, parameters = outcome.runs[0].steps[-1], outcome.runs[0].parameters
    every_step = steps * ring_all_reduce_bytes(4 * parameters, sites)
    to_target = outcome.steps_to(target) if target is not None else None
    return {
        "method": outcome.method,
        "label": outcome.label,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "deviation": number(outcome.deviation),
        "losses": [number(loss) for loss in outcome.losses],
        "perplexity": number(outcome.perplexity, 4),
        "bytes_sent": outcome.bytes_sent,
        "less_than_ddp": number(every_step / outcome.bytes_sent, 2) if outcome.bytes_sent else None,
        "steps_to_target": number(to_target, 1),
        "grid": grid_figures(outcome),
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


def draw(found: Iterable[Outcome], path: Path) -> list[Path]:
    """Draw the mean curve of each method; returns the files, ``path`` with each of the endings."""
    curves = {f"{outcome.label}, lr {outcome.lr:g}": outcome.curve() for outcome in found}
    return draw_curves(path, curves, "MB sent by a site")
