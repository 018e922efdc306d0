"""The comparison as figures, as tables and as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from titan_ext.experiments.dept.outcome import Costs, Outcome
from titan_ext.experiments.plots import new_figure, save
from titan_ext.experiments.report import deviation, grid_figures, number
from titan_ext.launcher.text import bytes_text, columns, number_text


def row(outcome: Outcome, spent: Costs, languages: Sequence[str], target: float | None) -> dict[str, Any]:
    """The figures of an arm: means over the seeds, and standard deviations.

    Args:
        outcome: its runs.
        spent: its costs.
        languages: of the sites.
        target: normalised loss that the steps of the adaptation are counted to; None counts none.
    """
    steps = [] if target is None else outcome.steps_to(target)
    return {
        "arm": outcome.method,
        "label": outcome.label,
        "lr": outcome.lr,
        "pretrained": {each: _mean(outcome.normalised("pretrained", each)) for each in languages},
        "normalised": {each: _mean(outcome.normalised("continued", each)) for each in languages},
        "perplexity": {each: _mean(outcome.perplexity(each)) for each in languages},
        "loss": _mean(outcome.losses),
        "deviation": _spread(outcome.losses),
        "losses": [number(loss) for loss in outcome.losses],
        "continued_curve": _curve(outcome.continued()),
        "adapted_loss": _mean(outcome.adapted_losses),
        "adapted_deviation": _spread(outcome.adapted_losses),
        "adapted_curve": _curve(outcome.adapted()),
        "steps_to_target": _mean(steps),
        "steps_to_target_deviation": _spread(steps),
        **{key: number(value) for key, value in asdict(spent).items()},
        "grid": grid_figures(outcome),
    }


def by_language(figures: Sequence[Mapping[str, Any]], key: str, form: str) -> list[str]:
    """Lines of what a row has for each language, and its mean over them."""
    languages = list(figures[0][key])
    body = []
    for each in figures:
        values = [each[key][language] for language in languages]
        values.append(None if None in values else mean(values))
        body.append([each["label"], *(number_text(value, form) for value in values)])
    return columns([[key, *languages, "mean"], *body])


def adaptation(figures: Sequence[Mapping[str, Any]], language: str, target: float | None) -> list[str]:
    """Lines of the adaptation: normalised loss on the way and at the end, and steps to the target."""
    steps = [step for step, _ in figures[0]["adapted_curve"]]
    shown = steps[:: max(1, len(steps) // 5)][:5]
    titles = [f"{language} after step", *map(str, shown), "last", "+-", f"steps to {number_text(target, '.4f')}", "+-"]
    return columns([titles, *(_adaptation_cells(each, shown) for each in figures)])


def costs_table(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of what the arms' sites hold and send; shares are those of the first arm."""
    titles = ["a site's", "vocabulary", "embedding", "parameters", "by formula", "share"]
    titles += ["sent a round", "by formula", "share"]
    return columns([titles, *(_cost_cells(each, figures[0]) for each in figures)])


def _adaptation_cells(figures: Mapping[str, Any], shown: Sequence[int]) -> list[str]:
    curve = dict(figures["adapted_curve"])
    return [
        figures["label"],
        *(number_text(curve.get(step), ".3f") for step in shown),
        number_text(figures["adapted_loss"], ".4f"),
        number_text(figures["adapted_deviation"], ".4f"),
        number_text(figures["steps_to_target"], ".1f"),
        number_text(figures["steps_to_target_deviation"], ".1f"),
    ]


def _cost_cells(figures: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    return [
        figures["label"],
        f"{figures['vocabulary']:,.0f}",
        f"{figures['embedding']:,.0f}",
        f"{figures['parameters']:,.0f}",
        f"{figures['parameters_by_formula']:,.0f}",
        f"{figures['parameters'] / first['parameters']:.3f}",
        bytes_text(figures["bytes_a_round"]),
        bytes_text(figures["bytes_a_round_by_formula"]),
        f"{figures['bytes_a_round'] / first['bytes_a_round']:.4f}",
    ]


def _curve(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float | None]]:
    return [(step, number(loss)) for step, loss in curve]


def _mean(values: Sequence[float]) -> float | None:
    return number(mean(values)) if values else None


def _spread(values: Sequence[float]) -> float | None:
    return number(deviation(values))


def draw(rows: Sequence[Mapping[str, Any]], unseen: str, path: Path) -> list[Path]:
    """Draw the rows of a report; returns the files, ``path`` with each of the endings."""
    figure = new_figure(width=16)
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
    return save(figure, path)
