"""What came of the arms: rows of figures, tables and curves."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from titan_ext.experiments.claims import SeedDifferences, print_claims
from titan_ext.experiments.plots import new_figure, save
from titan_ext.experiments.report import TunedOutcome, grid_figures, number, rates_tried
from titan_ext.experiments.tiny.arms import Arm, Result, half_life
from titan_ext.launcher.text import bytes_text, columns, number_text

Outcomes = Mapping[str, TunedOutcome[Result]]

Place = tuple[int, float, int]
"""Windows of a site and step, the share of the steps in which the learning rate decays, and the steps."""


def rows(
    part: str, places: Iterable[Place], arms: Mapping[str, Arm], found: Mapping[Place, Outcomes]
) -> list[dict[str, Any]]:
    """A row of figures for each place and arm of a part.

    Args:
        part: its name.
        places: where its arms were trained.
        arms: by name; one of them is "ddp".
        found: by place and name what came of them.
    """
    return [_row(part, place, name, arms, found[place]) for place in places for name in arms]


def _row(part: str, place: Place, name: str, arms: Mapping[str, Arm], found: Outcomes) -> dict[str, Any]:
    arm, outcome, ddp = arms[name], found[name], found["ddp"]
    own = found[arm.own]
    return {
        "part": part,
        "batch": place[0],
        "decay": place[1],
        "steps": place[2],
        "arm": name,
        "label": arm.label,
        "k": arm.sync_every,
        "k_over_half_life": _ratio(arm),
        "lr": outcome.lr,
        "trials": len(outcome.grid),
        "loss": number(outcome.loss),
        **_figures("gap", SeedDifferences.between(outcome.losses, ddp.losses)),
        **_figures("own_gap", SeedDifferences.between(outcome.losses, own.losses)),
        "losses": [number(each) for each in outcome.losses],
        "bytes_sent": outcome.runs[0].bytes_sent,
        "grid": grid_figures(outcome),
        "curve": _curve(outcome.runs),
    }


def _ratio(arm: Arm) -> float | None:
    slowest = max(arm.betas) if arm.low_rank is None else arm.low_rank.beta
    return None if arm.sync_every is None else number(arm.sync_every / half_life(slowest), 4)


def _figures(key: str, of: SeedDifferences) -> dict[str, float | None]:
    mean_of = number(of.mean) if all(map(isfinite, of.values)) else None
    return {key: mean_of, f"{key}_half_width": number(of.half_width)}


def _curve(runs: Sequence[Result]) -> list[tuple[int, float | None]]:
    return [
        (step, number(mean(losses), 4) if None not in losses else None)  # type: ignore[type-var]
        for step, losses in zip(runs[0].steps, zip(*(run.losses for run in runs)), strict=False)
    ]


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print the tables and the claims."""
    print(
        f"{figures['parameters']:,} parameters, {figures['sites']} sites, {figures['corpus']}, {figures['warmup']} steps of "
        f"warm-up and {figures['steps']} steps, {figures['seeds']} seed(s)"
    )
    for part, hypothesis in figures["hypotheses"].items():
        own = [row for row in figures["rows"] if row["part"] == part]
        print(f"\n{part}: {hypothesis}", *_table(own), sep="\n")
        for place in dict.fromkeys((row["batch"], row["decay"]) for row in own):
            print("\nloss by learning rate on the first seed, batch {}, decay {:g}".format(*place))
            print(*rates_tried([row for row in own if (row["batch"], row["decay"]) == place]), sep="\n")
    print_claims("\nexpected from the paper, and what came out", figures["claims"])


def _table(own: Sequence[Mapping[str, Any]]) -> list[str]:
    titles = ["arm", "batch", "decay", "K/half-life", "lr", "loss", "gap", "+-", "own gap", "+-", "sent"]
    body = [
        [
            row["label"],
            str(row["batch"]),
            f"{row['decay']:g}",
            number_text(row["k_over_half_life"], ".3f"),
            f"{row['lr']:g}",
            number_text(row["loss"], ".4f"),
            *(
                number_text(row[f"{key}{end}"], form)
                for key in ("gap", "own_gap")
                for end, form in (("", "+.4f"), ("_half_width", ".4f"))
            ),
            bytes_text(row["bytes_sent"]),
        ]
        for row in own
    ]
    return columns([titles, *body])


def draw(figures: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Draw the mean curves of each part's arms; returns the files, ``path`` with each of the endings."""
    places = list(dict.fromkeys(map(_place, figures)))
    figure = new_figure(width=6 * len(places))
    for axis, place in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        for row in figures:
            if _place(row) == place:
                axis.plot(*zip(*row["curve"], strict=True), label=row["label"])
        axis.set(xlabel="steps after the warm-up", ylabel="validation loss (nats a character)")
        axis.set_title("{}, batch {}, decay {:g}".format(*place))
        axis.legend(fontsize="x-small")
    return save(figure, path)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["part"], row["batch"], row["decay"]
