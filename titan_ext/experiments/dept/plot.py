"""The comparison drawn: losses over the steps of continued pre-training and of adaptation, and what a site holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FORMATS = ("png", "svg")


def draw(rows: Sequence[Mapping[str, Any]], unseen: str, path: Path) -> list[Path]:
    """Draw the rows of a report; returns the files, ``path`` with each of the endings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), layout="constrained")
    continued, adapted, sent = figure.subplots(1, 3)
    for row in rows:
        continued.plot(*zip(*row["continued_curve"]), label=f"{row['label']}, lr {row['lr']:g}")
        adapted.plot(*zip(*row["adapted_curve"]))
        sent.scatter(row["bytes_a_round"] / 1e6, row["parameters"] / 1e3)
        sent.annotate(row["label"], (row["bytes_a_round"] / 1e6, row["parameters"] / 1e3))
    continued.set(xlabel="steps of continued pre-training", ylabel="unigram-normalised loss (nats a token)")
    adapted.set(xlabel=f"steps of adaptation to {unseen}")
    sent.set(xlabel="MB that a site sends a round", ylabel="thousand parameters of a site", xscale="log")
    continued.legend()
    files = [path.with_name(f"{path.name}.{ending}") for ending in _FORMATS]
    for file in files:
        figure.savefig(file)
    return files
