"""The comparison as tables and as a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_ext.experiments.adapt.arms import SOURCES, STANDARDIZED
from titan_ext.experiments.claims import print_claims
from titan_ext.experiments.plots import new_figure, save
from titan_ext.experiments.report import rates_tried
from titan_ext.launcher.text import columns, number_text


def show(figures: Mapping[str, Any]) -> None:
    """Print the comparison, the learning rates tried, and the claims."""
    print(
        f"targets: {figures['targets']}, {figures['own_share']:.0%} of a site's sequences each; {figures['steps']} steps, "
        f"a round every {figures['sync_every']}, {figures['seeds']} seed(s)\n"
    )
    titles = ["arm", "lr", "loss", "+-", "less", "+-", *SOURCES]
    body = [
        [
            row["label"],
            f"{row['lr']:g}",
            number_text(row["loss"], ".4f"),
            number_text(row["deviation"], ".4f"),
            number_text(row["less"], "+.4f"),
            number_text(row["less_half_width"], ".4f"),
            *(number_text(row[name], ".3f") for name in SOURCES),
        ]
        for row in figures["rows"]
    ]
    print(*columns([titles, *body]), sep="\n")
    print("", *rates_tried(figures["rows"]), sep="\n")
    print_claims("\nexpected, and what came out (noise: standard deviation over seeds)", figures["claims"])


def draw(figures: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw each arm's loss, and beside it the weights of the sources over the steps under standardised scores."""
    figure = new_figure(12)
    losses, weights = figure.subplots(1, 2)
    rows = [row for row in figures["rows"] if row["loss"] is not None]
    names, values = [row["label"] for row in rows], [row["loss"] for row in rows]
    losses.errorbar(values, names, xerr=[row["deviation"] or 0.0 for row in rows], fmt="o", capsize=3)
    losses.invert_yaxis()
    losses.set(xlabel="loss on the target, nats a byte")
    chosen = next(row for row in figures["rows"] if row["label"] == STANDARDIZED)
    steps = [(place + 1) * figures["sync_every"] for place in range(len(chosen["curve"]))]
    for name, curve in zip(SOURCES, zip(*chosen["curve"]), strict=True):
        weights.plot(steps, [float("nan") if each is None else each for each in curve], label=name)
    weights.set(xlabel="inner steps", ylabel=f"mean weight ({STANDARDIZED})", ylim=(0, 1))
    weights.legend()
    return save(figure, path)
