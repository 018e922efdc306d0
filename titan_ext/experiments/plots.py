"""Plots: checked before anything is trained, written as PNG and SVG."""

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


def save(figure: "Figure", path: Path) -> list[Path]:
    """Write ``PATH.png`` and ``PATH.svg``; returns both."""
    files = [path.with_name(f"{path.name}.{ending}") for ending in _FORMATS]
    for file in files:
        figure.savefig(file)
    return files
