"""The comparison as figures, as tables and as a plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_ext.experiments.abbie.outcome import Outcome
from titan_ext.experiments.abbie.variants import VARIANTS
from titan_ext.experiments.plots import new_figure, save
from titan_ext.experiments.report import number
from titan_ext.launcher.text import bytes_text, columns, number_text


def rows(found: Iterable[Outcome]) -> list[dict[str, Any]]:
    """A row of figures for each variant; by number of iterations where there is one for each."""
    return [_row(outcome) for outcome in found]


def perplexities(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of perplexities and their standard deviations."""
    titles = ["perplexity at iterations", *figures[0]["perplexity"]]
    return columns([titles, *([row["label"], *(_perplexity(row, count) for count in titles[1:])] for row in figures)])


def drifts(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of what iterating does to the tail's input."""
    titles = ["tail's input at iterations", *figures[0]["cosine"]]
    return columns([titles, *([row["label"], *(_drift(row, count) for count in titles[1:])] for row in figures)])


def speed_table(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of the measurement of speed."""
    titles = ["decoder", "compiled", "parameters", "flops/token", "tokens/s", "x speed", "memory", "x memory"]
    return columns([titles, *(_speed(row) for row in figures)])


def _row(outcome: Outcome) -> dict[str, Any]:
    counts = outcome.iterations
    perplexity = {str(count): outcome.perplexity(count) for count in counts}
    return {
        "variant": outcome.variant,
        "label": outcome.label,
        "parameters": outcome.runs[0].parameters,
        "tokens": outcome.runs[0].tokens,
        "perplexity": {count: number(value) for count, (value, _) in perplexity.items()},
        "deviation": {count: number(deviation) for count, (_, deviation) in perplexity.items()},
        "losses": {str(count): [number(loss) for loss in outcome.losses(count)] for count in counts},
        "cosine": {str(count): number(outcome.cosine(count)) for count in counts},
        "size": {str(count): number(outcome.size(count)) for count in counts},
    }


def _perplexity(row: Mapping[str, Any], count: str) -> str:
    if row["perplexity"][count] is None:
        return "diverged"
    deviation = row["deviation"][count]
    return f"{row['perplexity'][count]:.3f}" + (f" ±{deviation:.3f}" if deviation is not None else "")


def _drift(row: Mapping[str, Any], count: str) -> str:
    return f"{number_text(row['cosine'][count], '.3f')} x{number_text(row['size'][count], '.2f')}"


def _speed(row: Mapping[str, Any]) -> list[str]:
    compiled = "yes" if row["compiled"] else "no"
    if "error" in row:
        return ["(does not compile)", compiled, *["-"] * 6]
    return [
        f"{VARIANTS[row['variant']].label}, {row['applied_blocks']} blocks",
        compiled,
        f"{row['parameters']:,}",
        f"{row['operations']:,}",
        f"{row['tokens_per_second']:,}",
        f"{row['speed_ratio']:.3f}",
        bytes_text(row["memory_bytes"]),
        f"{row['memory_ratio']:.3f}",
    ]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw the rows of a report; returns the files, ``path`` with each of the endings."""
    from matplotlib.ticker import ScalarFormatter

    figure = new_figure(width=12)
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
    return save(figure, path)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
