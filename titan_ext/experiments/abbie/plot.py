"""The comparison drawn: perplexity over iterations, and what iterating does to the tail's input."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FORMATS = ("png", "svg")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw the rows of a report; returns the files, ``path`` with each of the endings."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    quality, drift = figure.subplots(1, 2)
    for row in rows:
        counts = [int(count) for count in row["perplexity"]]
        perplexities, cosines = ([_nan(each) for each in row[key].values()] for key in ("perplexity", "cosine"))
        deviations = [each or 0.0 for each in row["deviation"].values()]
        quality.errorbar(counts, perplexities, yerr=deviations, marker="o", capsize=3, label=row["label"])
        drift.plot(counts, cosines, marker="o")
    # What lies within one of each other must be told apart beside a baseline at many times that.
    quality.set(yscale="log", ylabel="perplexity of a byte")
    quality.yaxis.set_major_formatter(ScalarFormatter())
    quality.yaxis.set_minor_formatter(ScalarFormatter())
    drift.set(ylabel="cosine of the tail's input with that at the trained number")
    for axes in (quality, drift):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("iterations at evaluation")
    quality.legend()
    files = [path.with_name(f"{path.name}.{ending}") for ending in _FORMATS]
    for file in files:
        figure.savefig(file)
    return files


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
