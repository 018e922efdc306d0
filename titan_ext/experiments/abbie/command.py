"""Perplexity of AbbIE's variants at other numbers of iterations than they were trained with, on real text.

A standard decoder, the recurrent-depth baseline, variant C and all readings of variant D are trained with 2
iterations (the standard decoder with 1) on the same tokens in the same order, at equal parameters, and evaluated on
documents that none is trained on. Tokens are bytes.

  perplexity     of a byte; mean and standard deviation over the seeds
  tail's input   its cosine with the tail's input at the trained number of iterations, and its norm as a multiple of
                 that one's: how far iterating leads away from what the tail has learned on
  speed          forward and backward of D against a standard decoder of as many blocks as D applies, which is equal
                 flops; memory is that of parameters, gradients and what forward keeps for backward

Readings of D: "prev" adds what the body was given, "input" the head's output; "final skip" adds it after the last
iteration too; "mean" halves the sum, "norm" divides it by its root mean square. "prev" and "input" are one training,
for they differ beyond 2 iterations only. The paper's gain beyond 2 iterations is at 200M and 350M parameters.

Runs go side by side, one for each core (on a GPU one after another). With --out each run is kept when it ends, and
the same command goes on where it was.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from titan_ext.bench.flags import require_flag
from titan_ext.experiments import command
from titan_ext.experiments.abbie.variants import VARIANTS, Result, Settings, describe, training_of

HELP = "perplexity of AbbIE's variants over iterations, and speed at equal flops"

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
    command.begin(parser, _EXAMPLES)
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
    command.add_corpus(parser)
    parser.add_argument("--compile", action="store_true", help="train compiled blocks")
    parser.add_argument("--speed-turns", type=int, default=10, help="turns of each speed; 0: none (default: 10)")
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, lr, variants = _checked(options)
    from titan_ext.experiments.abbie.outcome import claims, outcomes
    from titan_ext.experiments.abbie.report import draw, rows
    from titan_ext.experiments.abbie.speed import speeds
    from titan_ext.experiments.abbie.train import train

    done = command.train_missing(
        options,
        settings,
        {training_of(variant): [lr] for variant in variants},
        train=train,
        arguments=(settings,),
        result_type=Result,
        describe=describe,
    )
    found = outcomes(variants, settings.iterations, lr, options.seeds, done)
    figures = {**asdict(settings), "lr": lr, "seeds": options.seeds, "rows": rows(found.values())}
    figures["claims"] = claims(found, settings.iterations)
    _print(figures)
    if options.plot is not None:
        print("drawn:", *draw(figures["rows"], options.plot))
    figures["speed"] = list(speeds(settings, options.speed_turns)) if options.speed_turns else []
    _print_speed(figures["speed"])
    return figures


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.abbie.report import drifts, perplexities
    from titan_ext.experiments.claims import print_claims

    rows = figures["rows"]
    sizes = sorted({f"{row['parameters']:,}" for row in rows})
    print(
        f"{figures['flavor']}: {' or '.join(sizes)} parameters, {rows[0]['tokens']:,} tokens of {figures['corpus']}, "
        f"learning rate {figures['lr']:g}, {figures['seeds']} seed(s)\n"
    )
    print(*perplexities(rows), sep="\n")
    print("\ncosine with the tail's input at the trained number of iterations, and multiple of its norm")
    print(*drifts(rows), sep="\n")
    print_claims("\nexpected, and what came out (noise: standard deviation over seeds)", figures["claims"])
    print(flush=True)


def _print_speed(rows: list[dict[str, Any]]) -> None:
    from titan_ext.experiments.abbie.report import speed_table

    if rows:
        print("forward and backward at equal flops", *speed_table(rows), sep="\n")
    for row in rows:
        if "error" in row:
            print(f"compiling failed: {row['error']}")


def _checked(options: argparse.Namespace) -> tuple[Settings, float, list[str]]:
    """Settings, learning rate and variants of a comparison, before anything is trained.

    Raises:
        UserError: an option is out of range, the corpus cannot be read, or what a plot needs is missing.
    """
    defaults = _DEFAULTS[options.flavor]
    for key in ("steps", "batch", "length", "lr"):
        if getattr(options, key) is None:
            setattr(options, key, getattr(defaults, key))
    for key, least in _LEAST.items():
        require_flag(getattr(options, key) >= least, key, getattr(options, key), f"at least {least}")
    require_flag(0 < options.lr < math.inf, "lr", options.lr, "a number above 0")
    variants = command.chosen(options.variants, "variants", list(VARIANTS))
    options.iterations = _iterations(options)
    settings = command.settings_of(options, Settings)
    command.check_run_arguments(options)
    from titan_ext.experiments.text import check_text

    check_text(settings)
    return settings, options.lr, variants


def _iterations(options: argparse.Namespace) -> tuple[int, ...]:
    try:
        iterations = tuple(sorted({int(each) for each in options.iterations.split(",")}))
    except ValueError:
        iterations = ()
    fine = bool(iterations) and iterations[0] >= 1
    require_flag(fine, "iterations", options.iterations, "numbers of at least 1, such as 1,2,4,8")
    return iterations
