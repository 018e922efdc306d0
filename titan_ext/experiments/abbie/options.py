"""The options of ``titan-ext bench abbie``: their defaults by size of the model, and their checks."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titan_ext.experiments.abbie.variants import VARIANTS
from titan_ext.experiments.convergence.plot import check_plot
from titan_ext.experiments.flags import check_device, require

if TYPE_CHECKING:
    from titan_ext.experiments.abbie.settings import Settings

_EXAMPLES = """\
examples:
  titan-ext bench abbie --out runs/abbie --plot runs/abbie/perplexity       all variants, on the CPU
  titan-ext bench abbie --variants standard,c,d_prev --seeds 1 --steps 200  a first look at three
  titan-ext bench abbie --flavor 350M --device cuda --compile --seeds 1 --corpus 'text/*.parquet' --out runs/abbie-350M
"""


@dataclass(frozen=True)
class _Defaults:
    steps: int
    batch: int
    length: int
    lr: float


# The larger ones train on 20 tokens a parameter, as the paper does.
_DEFAULTS = {
    "tiny": _Defaults(steps=1000, batch=16, length=96, lr=2e-3),
    "debugmodel": _Defaults(steps=5_400, batch=64, length=256, lr=2e-3),
    "200M": _Defaults(steps=52_000, batch=64, length=1024, lr=6e-4),
    "350M": _Defaults(steps=94_000, batch=64, length=1024, lr=3e-4),
}
_LEAST = {"steps": 1, "batch": 1, "length": 1, "seeds": 1, "speed_turns": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, variants, and where results go."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--flavor", choices=_DEFAULTS, default="tiny", help="size of the model (default: tiny)")
    for key, kind, text in (
        ("steps", int, "steps of a run"),
        ("batch", int, "sequences a step"),
        ("length", int, "tokens a sequence"),
        ("lr", float, "learning rate of all"),
    ):
        defaults = ", ".join(f"{flavor} {getattr(each, key):g}" for flavor, each in _DEFAULTS.items())
        parser.add_argument(f"--{key}", type=kind, help=f"{text} (default: {defaults})")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    names = ", ".join(VARIANTS)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"comma-separated, of {names} (default: all)")
    parser.add_argument("--iterations", default="1,2,4,8", help="numbers to evaluate at (default: 1,2,4,8)")
    parser.add_argument("--corpus", default="builtin:docs", help="file, folder, glob, built-in (default: builtin:docs)")
    parser.add_argument("--device", default="cpu", help='"cpu", or the accelerator, such as "cuda" (default: cpu)')
    parser.add_argument("--compile", action="store_true", help="train compiled blocks")
    parser.add_argument("--workers", type=int, help="runs side by side (default: one for each core; 1 off the CPU)")
    parser.add_argument("--speed-turns", type=int, default=10, help="turns of each speed; 0: none (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep each finished run there, and use those there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw into PATH.png and PATH.svg (matplotlib)")


def checked(options: argparse.Namespace) -> tuple["Settings", float, list[str]]:
    """Settings, learning rate and variants of a comparison, before anything is trained.

    Raises:
        UserError: an option is out of range, the corpus cannot be read, or what a plot needs is missing.
    """
    defaults = _DEFAULTS[options.flavor]
    for key in ("steps", "batch", "length", "lr"):
        if getattr(options, key) is None:
            setattr(options, key, getattr(defaults, key))
    for key, least in _LEAST.items():
        require(getattr(options, key) >= least, key, getattr(options, key), f"at least {least}")
    require(0 < options.lr < math.inf, "lr", options.lr, "a number above 0")
    require(options.workers is None or options.workers >= 1, "workers", options.workers, "at least 1")
    variants = list(dict.fromkeys(options.variants.split(",")))
    for variant in variants:
        require(variant in VARIANTS, "variants", variant, f"of {', '.join(VARIANTS)}")
    if options.plot is not None:
        check_plot(options.plot)
    settings = _settings(options)
    _check_surroundings(settings)
    return settings, options.lr, variants


def _settings(options: argparse.Namespace) -> "Settings":
    from titan_ext.experiments.abbie.settings import Settings

    try:
        iterations = tuple(sorted({int(each) for each in options.iterations.split(",")}))
    except ValueError:
        iterations = ()
    fine = bool(iterations) and iterations[0] >= 1
    require(fine, "iterations", options.iterations, "numbers of at least 1, such as 1,2,4,8")
    return Settings(
        flavor=options.flavor,
        steps=options.steps,
        batch=options.batch,
        length=options.length,
        iterations=iterations,
        corpus=options.corpus,
        device=options.device,
        compile=options.compile,
    )


def _check_surroundings(settings: "Settings") -> None:
    """The device is there, and the corpus has text."""
    from titan_ext.experiments.convergence.text import training_text, validation_text

    check_device(settings.device)
    validation_text(settings)
    next(training_text(settings, seed=0))
