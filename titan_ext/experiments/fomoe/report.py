"""The comparison as figures, as a table and as a plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_ext.experiments.fomoe.arms import Result, Settings, arms, expected_bytes
from titan_ext.experiments.plots import new_figure, save
from titan_ext.experiments.report import TunedOutcome, grid_figures, number
from titan_ext.launcher.text import bytes_text, columns, number_text


def rows(settings: Settings, found: Iterable[TunedOutcome[Result]]) -> list[dict[str, Any]]:
    """A row of figures for each arm."""
    return [_row(settings, outcome) for outcome in found]


def table(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the comparison."""
    titles = ["arm", "lr", "loss", "+-", "seeds", "at a site", "held", "sent a round", "by formula", "evenness"]
    body = [
        [
            row["arm"],
            f"{row['lr']:g}",
            number_text(row["loss"], ".4f"),
            number_text(row["deviation"], ".4f"),
            " ".join(number_text(loss, ".4f") for loss in row["losses"]),
            number_text(row["loss_at_a_site"], ".4f"),
            f"{row['parameters_held']:,}",
            bytes_text(row["bytes_a_round"][0]),
            bytes_text(row["expected_bytes"]),
            number_text(row["evenness"], ".3f"),
        ]
        for row in figures
    ]
    return columns([titles, *body])


def draw(figures: Iterable[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw each arm's loss, with its deviation, over the bytes that it sends in a round.

    An arm that diverged is left out. Returns the files, ``path`` with each of the endings.
    """
    figure = new_figure(width=7)
    axes = figure.subplots()
    for row in (each for each in figures if each["loss"] is not None):
        sent = row["bytes_a_round"][0] / 1e6
        axes.errorbar(
            sent, row["loss"], row["deviation"], marker="o", capsize=3, label=f"{row['label']}, lr {row['lr']:g}"
        )
    axes.set(xlabel="MB sent by a site in a round", ylabel="validation loss of the whole model (nats a token)")
    axes.legend()
    return save(figure, path)


def _row(settings: Settings, outcome: TunedOutcome[Result]) -> dict[str, Any]:
    first = outcome.runs[0]
    at_sites = [loss for each in outcome.runs for loss in each.loss_of_sites if loss is not None]
    return {
        "arm": outcome.method,
        "label": outcome.method,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "deviation": number(outcome.deviation),
        "losses": [number(loss) for loss in outcome.losses],
        "loss_at_a_site": number(sum(at_sites) / len(at_sites)) if at_sites else None,
        "parameters_held": first.parameters_held,
        "bytes_a_round": first.bytes_a_round,
        "expected_bytes": expected_bytes(settings, arms(settings.sites)[outcome.method], first.body),
        "evenness": number(first.entropy, 4),
        "grid": grid_figures(outcome),
    }
