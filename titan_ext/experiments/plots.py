"""Plots: checked before anything is trained, written as PNG and SVG."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from titan_ext.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = ("png", "svg")


def check_plot(path: Path) -> None:
    """Make the folder of the plot.

    Raises:
        UserError: matplotlib is missing, or the folder cannot be made.
    """
    if find_spec("matplotlib") is None:
        raise UserError("--plot: needs matplotlib, which is not installed: pip install matplotlib")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot make its folder: {error.strerror}") from error


def new_figure(width: int) -> "Figure":
    """An empty figure of this width in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 5), layout="constrained")


def draw_curves(path: Path, curves: Mapping[str, Sequence[tuple[int, float, int]]], amount: str) -> list[Path]:
    """Draw validation losses over inner steps and, beside it, over what was spent; returns the files.

    Args:
        path: of the plot, without an ending.
        curves: by label the step, the loss in nats a token and the amount of each measurement.
        amount: name of the second axis, which is logarithmic and in millions.
    """
    figure = new_figure(width=12)
    over_steps, over_amount = figure.subplots(1, 2, sharey=True)
    for label, curve in curves.items():
        steps, losses, amounts = zip(*curve)
        over_steps.plot(steps, losses, label=label)
        over_amount.plot([each / 1e6 for each in amounts], losses)
    over_steps.set(xlabel="inner steps", ylabel="validation loss (nats a token)")
    over_amount.set(xlabel=amount, xscale="log")
    over_steps.legend()
    return save(figure, path)


def save(figure: "Figure", path: Path) -> list[Path]:
    """Write ``PATH.png`` and ``PATH.svg``; returns both."""
    files = [path.with_name(f"{path.name}.{ending}") for ending in _FORMATS]
    for file in files:
        figure.savefig(file)
    return files
