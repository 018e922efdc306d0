"""The comparison as figures, as tables and as a plot."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from titan_ext.experiments.abbie.outcome import Found, Outcome, to_standard
from titan_ext.experiments.abbie.variants import VARIANTS, Settings
from titan_ext.experiments.claims import SeedDifferences
from titan_ext.experiments.plots import new_figure, save
from titan_ext.experiments.report import grid_figures, number
from titan_ext.launcher.text import bytes_text, columns, number_text


def rows(found: Found, settings: Settings) -> list[dict[str, Any]]:
    """Rows of figures by part: each variant beside the standard decoder, and with more iterations than trained."""
    return [
        *(_standard_row(found, each, steps) for steps in settings.steps for each in found.values()),
        *(
            _beyond_row(each, steps)
            for steps in settings.steps
            for each in found.values()
            if each.variant != "standard"
        ),
    ]


def _standard_row(found: Found, own: Outcome, steps: int) -> dict[str, Any]:
    run, losses = own.tuned.runs[0], own.losses(steps, own.trained)
    tokens = run.tokens[own.settings.steps.index(steps)]
    row: dict[str, Any] = {
        "part": "standard",
        "variant": own.variant,
        "label": own.label,
        "steps": steps,
        "parameters": run.parameters,
        "tokens": tokens,
        "tokens_a_parameter": round(tokens / run.parameters, 1),
        "lr": own.tuned.lr,
        "trials": len(own.tuned.grid),
        "loss": number(mean(losses)),
        "losses": [number(each) for each in losses],
        "grid": grid_figures(own.tuned),
    }
    # More blocks are more parameters, of which a comparison says nothing.
    alike = "standard" in found and VARIANTS[own.variant].depth == 1
    return row | (_figures("gap", to_standard(found, own.variant, steps)) if alike else {})


def _beyond_row(own: Outcome, steps: int) -> dict[str, Any]:
    row: dict[str, Any] = {"part": "beyond", "variant": own.variant, "label": own.label, "steps": steps}
    others = [each for each in own.settings.iterations if each != own.trained]
    for count in others:
        row |= _figures(f"rise_at_{count}", own.rise(steps, count))
    for count in (each for each in others if each > own.trained):
        row |= _figures(f"rescaled_rise_at_{count}", own.rise(steps, count, "rescaled"))
        row |= {f"norm_at_{count}": _mean(own.values("sizes", steps, count))}
        row |= {f"cosine_at_{count}": _mean(own.values("cosines", steps, count))}
    return row


def _figures(key: str, of: SeedDifferences) -> dict[str, float | None]:
    mean_of = number(of.mean) if all(map(isfinite, of.values)) else None
    return {key: mean_of, f"{key}_half_width": number(of.half_width)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return number(mean(known), 3) if len(known) == len(values) else None


def tables(figures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of both parts."""
    for part in dict.fromkeys(row["part"] for row in figures):
        own = [row for row in figures if row["part"] == part]
        hidden = ("part", "variant", "label", "parameters", "losses", "grid")
        keys = [key for key in own[0] if key not in hidden and not key.endswith("_half_width")]
        body = [[row["label"], *(_cell(row, key) for key in keys)] for row in own]
        yield from ("", *columns([["", *(key.replace("_", " ") for key in keys)], *body]))


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, half = row.get(key), row.get(f"{key}_half_width")
    if isinstance(value, int):
        return f"{value:,}"
    if f"{key}_half_width" not in row:
        return number_text(value, ".5g")
    return number_text(value, "+.4f") + ("" if half is None else f" ±{half:.4f}")


def speed_table(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines of the measurement of speed."""
    titles = ["decoder", "compiled", "parameters", "flops/token", "tokens/s", "x speed", "memory", "x memory"]
    return columns([titles, *(_speed(row) for row in figures)])


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


def draw(figures: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw gap and rises over the length of training; returns the files, ``path`` with each of the endings."""
    rises = [key for key in figures[-1] if key.startswith("rise_at_") and not key.endswith("_half_width")]
    keys = [("standard", "gap"), *(("beyond", key) for key in rises)]
    figure = new_figure(width=6 * len(keys))
    for axis, (part, key) in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        own = [row for row in figures if row["part"] == part and row.get(key) is not None]
        for label in dict.fromkeys(row["label"] for row in own):
            curve = [row for row in own if row["label"] == label]
            halves = [row[f"{key}_half_width"] or 0.0 for row in curve]
            axis.errorbar([row["steps"] for row in curve], [row[key] for row in curve], halves, capsize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="steps", ylabel=f"{key.replace('_', ' ')} (nats a token)")
        axis.legend(fontsize="x-small")
    return save(figure, path)
