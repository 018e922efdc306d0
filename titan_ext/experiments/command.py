"""The flags that reproductions share, their checks, and the training of what is missing."""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from titan_ext.bench.flags import Numbers, check_numbers, require_flag
from titan_ext.experiments.plots import check_plot

if TYPE_CHECKING:
    from titan_ext.experiments.tuning import Run

S = TypeVar("S")


def begin(parser: argparse.ArgumentParser, examples: str) -> None:
    """Show the examples below the help, laid out as they are written."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = examples


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """``--corpus``, with which the text that comes with the package is trained on unless another is given."""
    parser.add_argument(
        "--corpus", default="builtin:docs", help="file, folder, glob or built-in (default: builtin:docs)"
    )


def add_learning_rates(parser: argparse.ArgumentParser, text: str, default: str = "2e-3,4e-3,8e-3") -> None:
    """``--learning-rates``; ``text`` says what they are."""
    parser.add_argument("--learning-rates", default=default, help=f"{text} (default: {default})")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where runs are trained, and where results go."""
    parser.add_argument("--device", default="cpu", help='"cpu", or the accelerator, such as "cuda" (default: cpu)')
    parser.add_argument("--workers", type=int, help="runs side by side (default: one for each core; 1 off the CPU)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep finished runs there, and use those that are")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw curves: PATH.png, PATH.svg (needs matplotlib)")


def check_sizes(options: argparse.Namespace, sizes: Numbers) -> None:
    """Raises UserError unless all numbers, the width of the model and the steps of its rounds are in range."""
    check_numbers(options, sizes)
    require_flag(options.dim % 32 == 0, "dim", options.dim, "a multiple of 32")
    every = options.sync_every
    require_flag(options.steps % every == 0, "steps", options.steps, f"a multiple of --sync-every ({every})")


def check_run_arguments(options: argparse.Namespace) -> None:
    """Raises UserError if the flags of ``add_run_arguments``, or ``--target``, do not fit this machine."""
    require_flag(options.workers is None or options.workers >= 1, "workers", options.workers, "at least 1")
    target = getattr(options, "target", None)
    require_flag(target is None or math.isfinite(target), "target", target, "a number")
    if options.plot is not None:
        check_plot(options.plot)
    import torch

    found = ["cpu"]
    if torch.accelerator.is_available():
        found.append(torch.accelerator.current_accelerator().type)
    require_flag(options.device in found, "device", options.device, f"of {', '.join(found)} on this machine")


def settings_of(options: argparse.Namespace, kind: type[S]) -> S:
    """The dataclass of a comparison's settings, each from the flag of its name."""
    return kind(**{each.name: getattr(options, each.name) for each in fields(cast(Any, kind))})


def chosen(text: str, key: str, known: Sequence[str]) -> list[str]:
    """The comma-separated names of a flag, each once.

    Raises:
        UserError: one is not known.
    """
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        require_flag(name in known, key, name, f"of {', '.join(known)}")
    return names


def learning_rates(text: str) -> list[float]:
    """The comma-separated numbers of ``--learning-rates``, ascending and distinct.

    Raises:
        UserError: one is no number above 0.
    """
    try:
        grid = sorted({float(each) for each in text.split(",")})
    except ValueError:
        grid = []
    fine = bool(grid) and all(0 < each < math.inf for each in grid)
    require_flag(fine, "learning_rates", text, "numbers above 0, such as 1e-3,2e-3")
    return grid


def train_missing(
    options: argparse.Namespace,
    settings: Any,
    grids: Mapping[str, Sequence[float]],
    *,
    train: Callable[..., Any],
    arguments: tuple,
    result_type: type,
    describe: Callable[[str], object],
    pool: Callable[..., Any] | None = None,
) -> "dict[Run, Any]":
    """Every run that the comparison needs, from ``--out`` or trained now.

    Args:
        options: with the flags of ``add_run_arguments`` and ``--seeds``.
        settings: of all runs, a dataclass with a ``device``.
        grids: ascending learning rates by method.
        train: called as ``train(*arguments, run)`` in a process of its own; importable by name.
        arguments: the same for all runs.
        result_type: what it returns, a dataclass of JSON values.
        describe: what a run of a method depends on besides settings, as JSON values.
        pool: makes the processes, as ``RunPool`` does, which is the default.

    Raises:
        UserError: ``--out`` cannot be made, or holds something else.
        RunError: a process failed.
    """
    from titan_ext.experiments.runs import ResultStore, RunPool, run_all

    store: ResultStore[Any] = ResultStore(options.out, settings, result_type, describe)
    cores = len(os.sched_getaffinity(0)) if settings.device == "cpu" else 1
    workers = options.workers or cores
    with (pool or RunPool)(train, arguments, workers, threads=max(1, cores // workers)) as processes:
        return run_all(grids, options.seeds, store, processes)
