"""The comparison as figures, as a table and as a plot."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from titan_ext.experiments.claims import SeedDifferences, claim
from titan_ext.experiments.participation.arms import Result, parse_arm
from titan_ext.experiments.plots import draw_curves
from titan_ext.experiments.report import TunedOutcome, grid_figures, number, steps_to
from titan_ext.launcher.text import columns, number_text


class Outcome(TunedOutcome[Result]):
    """One arm's runs at its best learning rate; losses are validation losses after the last round."""

    @property
    def tokens(self) -> int:
        """That all sources of a run have trained on."""
        return self.runs[0].tokens[-1]

    def curve(self) -> list[tuple[int, float, int]]:
        """Step, mean loss over seeds and tokens of each measurement up to the first that diverged."""
        first = self.runs[0]
        together = zip(first.steps, zip(*(run.losses for run in self.runs)), first.tokens)
        return [(step, mean(losses), tokens) for step, losses, tokens in together if None not in losses]


def rows(found: Iterable[Outcome]) -> list[dict[str, Any]]:
    """A row of figures for each arm."""
    outcomes = list(found)
    target = max((each.loss for each in outcomes if isfinite(each.loss)), default=None)
    return [_row(outcome, target) for outcome in outcomes]


def _row(outcome: Outcome, target: float | None) -> dict[str, Any]:
    drawn, population = parse_arm(outcome.method)
    reached = None if target is None else steps_to(((step, loss) for step, loss, _ in outcome.curve()), target)
    return {
        "arm": outcome.method,
        "label": outcome.method,
        "per_round": drawn,
        "population": population,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "deviation": number(outcome.deviation),
        "losses": [number(loss) for loss in outcome.losses],
        "tokens": outcome.tokens,
        "steps_to_common_loss": number(reached, 1),
        "fewest_turns": min(outcome.runs[0].turns),
        "most_turns": max(outcome.runs[0].turns),
        "grid": grid_figures(outcome),
    }


def table(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of the comparison."""
    titles = ["sources", "lr", "loss", "+-", "seeds", "tokens", "steps to common loss", "turns of a source"]
    body = [
        [
            f"{row['per_round']} of {row['population']}",
            f"{row['lr']:g}",
            "diverged" if row["loss"] is None else f"{row['loss']:.4f}",
            number_text(row["deviation"], ".4f"),
            " ".join(number_text(loss, ".4f") for loss in row["losses"]),
            f"{row['tokens']:,}",
            number_text(row["steps_to_common_loss"], ".0f"),
            f"{row['fewest_turns']} to {row['most_turns']}",
        ]
        for row in figures
    ]
    return columns([titles, *body])


def claims(found: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """What is expected of every two arms that differ in one thing, and what came out."""
    judged = []
    arms = [(name, *parse_arm(name)) for name in found]
    for less, few, population in arms:
        for more, many, same in arms:
            if population == same and few < many == population:
                judged.append(_partial(found[less], found[more]))
            if few == many and population < same:
                judged.append(_population(found[more], found[less]))
    return judged


def _partial(part: Outcome, whole: Outcome) -> dict[str, Any]:
    """Photon's report: convergence is robust to partial participation."""
    differences = SeedDifferences.between(part.losses, whole.losses)
    ratio = whole.tokens / part.tokens
    text = f"{part.method} converges as {whole.method} does, within noise, on {ratio:g} times fewer tokens"
    return claim(text, differences.is_not_above, f"loss {differences.text()}")


def _population(large: Outcome, small: Outcome) -> dict[str, Any]:
    differences = SeedDifferences.between(large.losses, small.losses)
    text = f"{large.method} converges as {small.method} does, within noise: what counts is how many train in a round"
    return claim(text, differences.is_not_above, f"loss {differences.text()}")


def draw(found: Iterable[Outcome], path: Path) -> list[Path]:
    """Draw the mean curve of each arm over steps and over tokens; returns the files."""
    curves = {f"{outcome.method.replace('of', ' of ')}, lr {outcome.lr:g}": outcome.curve() for outcome in found}
    return draw_curves(path, curves, "million tokens of all sources")
