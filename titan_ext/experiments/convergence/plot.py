"""The comparison drawn: validation loss over inner steps and over bytes."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from titan_ext.errors import UserError
from titan_ext.experiments.convergence.outcome import Outcome

_FORMATS = ("png", "svg")


def check_plot(path: Path) -> None:
    """Make the folder of the plot; raises UserError if nothing could be drawn there in the end."""
    if find_spec("matplotlib") is None:
        raise UserError("--plot: needs matplotlib, which is not installed: pip install matplotlib")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot make its folder: {error.strerror}") from error


def draw(found: Iterable[Outcome], path: Path) -> list[Path]:
    """Draw the mean curve of each method; returns the files, ``path`` with each of the endings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    over_steps, over_bytes = figure.subplots(1, 2, sharey=True)
    for outcome in found:
        steps, losses, sent = zip(*outcome.curve())
        over_steps.plot(steps, losses, label=f"{outcome.label}, lr {outcome.lr:g}")
        over_bytes.plot([size / 1e6 for size in sent], losses)
    over_steps.set(xlabel="inner steps", ylabel="validation loss (nats a token)")
    over_bytes.set(xlabel="MB sent by a site", xscale="log")
    over_steps.legend()
    files = [path.with_name(f"{path.name}.{ending}") for ending in _FORMATS]
    for file in files:
        figure.savefig(file)
    return files
