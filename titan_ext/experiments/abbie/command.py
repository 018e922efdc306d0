"""AbbIE's variants against the standard decoder over lengths of training, and beyond the trained iterations, on real text.

A standard decoder (1 iteration), variants C and D and others (2 iterations) are trained on the same tokens in the same
order, at equal parameters, each tuned over as many learning rates on the first seed, and measured on documents that none is
trained on. Tokens are bytes. All lengths of training are one run: from 80% of each length on a copy's learning rate falls
to 0 (warm up, stay, decay).

  gap            loss at the trained number of iterations, less the standard decoder's: mean over the seeds and 95%
                 interval (Student's t)
  rise at n      loss at n iterations less that at the trained number; rescaled: with each token's latent brought back to
                 its norm at the trained number before the tail
  norm, cosine   of the tail's input, against that at the trained number
  speed          forward and backward of D against a standard decoder of as many blocks as D applies, which is equal
                 flops; memory is that of parameters, gradients and what forward keeps for backward

Readings of D: "prev" adds what the body was given, "input" the head's output; "final skip" adds it after the last
iteration too; "mean" halves the sum, "norm" divides it by its root mean square. "prev" and "input" are one training,
for they differ beyond 2 iterations only. The paper's gain beyond 2 iterations is at 200M and 350M parameters.

Runs go side by side, one for each core (on a GPU one after another). With --out each run is kept when it ends, and
the same command goes on where it was.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from titan_ext.bench.flags import require_flag
from titan_ext.experiments import command
from titan_ext.experiments.abbie.variants import VARIANTS, Result, Settings, describe, training_of

HELP = "AbbIE's variants against the standard decoder over training and over iterations, and speed at equal flops"

_EXAMPLES = """\
examples:
  titan-ext bench abbie --out runs/abbie --plot runs/abbie/curves           as it was recorded, on the CPU
  titan-ext bench abbie --variants standard,c,d_prev --seeds 1 --steps 200  a first look at three
  titan-ext bench abbie --flavor 350M --device cuda --compile --seeds 1 --corpus 'text/*.parquet' --out runs/abbie-350M
"""
_CHOSEN = "standard,c,d_prev,d_input,d_sampled,d_deep"


@dataclass(frozen=True)
class _Defaults:
    steps: str
    batch: int
    length: int
    learning_rates: str


# The largest ones train on 20 tokens a parameter, as the paper does.
_DEFAULTS = {
    "micro": _Defaults(steps="125,250,500,1000,2000", batch=8, length=64, learning_rates="4e-3,8e-3,1.6e-2"),
    "tiny": _Defaults(steps="250,500,1000", batch=16, length=96, learning_rates="2e-3,4e-3,8e-3"),
    "debugmodel": _Defaults(steps="1350,2700,5400", batch=64, length=256, learning_rates="1e-3,2e-3,4e-3"),
    "200M": _Defaults(steps="13000,26000,52000", batch=64, length=1024, learning_rates="6e-4"),
    "350M": _Defaults(steps="23500,47000,94000", batch=64, length=1024, learning_rates="3e-4"),
}
_LEAST = {"batch": 1, "length": 1, "seeds": 1, "speed_turns": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, variants, and where results go."""
    command.begin(parser, _EXAMPLES)
    parser.add_argument("--flavor", choices=_DEFAULTS, default="micro", help="size of the model (default: micro)")
    for key, kind, text in (
        ("steps", str, "lengths of training in steps"),
        ("batch", int, "sequences a step"),
        ("length", int, "tokens a sequence"),
        ("learning_rates", str, "grid of every variant"),
    ):
        defaults = "; ".join(f"{flavor} {getattr(each, key)}" for flavor, each in _DEFAULTS.items())
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, help=f"{text} (default: {defaults})")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant at its best rate (default: 3)")
    names = ", ".join(VARIANTS)
    parser.add_argument("--variants", default=_CHOSEN, help=f"comma-separated, of {names} (default: {_CHOSEN})")
    parser.add_argument("--iterations", default="1,2,4,8", help="numbers to evaluate at (default: 1,2,4,8)")
    command.add_corpus(parser)
    parser.add_argument("--compile", action="store_true", help="train compiled blocks")
    parser.add_argument("--speed-turns", type=int, default=0, help="turns of each speed; 0: none (default: 0)")
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, grid, variants = _checked(options)
    from titan_ext.experiments.abbie.outcome import HYPOTHESES, claims, outcomes
    from titan_ext.experiments.abbie.report import draw, rows
    from titan_ext.experiments.abbie.speed import speeds
    from titan_ext.experiments.abbie.train import train

    done = command.train_missing(
        options,
        settings,
        {training_of(variant): grid for variant in variants},
        train=train,
        arguments=(settings,),
        result_type=Result,
        describe=describe,
    )
    found = outcomes(variants, settings, options.seeds, done)
    figures = {**asdict(settings), "seeds": options.seeds, "hypotheses": HYPOTHESES, "rows": rows(found, settings)}
    figures["claims"] = claims(found, settings)
    _print(figures)
    if options.plot is not None:
        print("drawn:", *draw(figures["rows"], options.plot))
    figures["speed"] = list(speeds(settings, options.speed_turns)) if options.speed_turns else []
    _print_speed(figures["speed"])
    return figures


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.abbie.report import tables
    from titan_ext.experiments.claims import print_claims
    from titan_ext.experiments.report import rates_tried

    own = [row for row in figures["rows"] if row["part"] == "standard"]
    sizes = sorted({f"{row['parameters']:,}" for row in own})
    print(f"{figures['flavor']}: {' or '.join(sizes)} parameters, {figures['corpus']}, {figures['seeds']} seed(s)")
    print(*tables(figures["rows"]), sep="\n")
    print("\nloss by learning rate on the first seed, after the longest training")
    print(*rates_tried([row for row in own if row["steps"] == figures["steps"][-1]]), sep="\n")
    print_claims("\nexpected, and what came out", figures["claims"])
    print(flush=True)


def _print_speed(rows: list[dict[str, Any]]) -> None:
    from titan_ext.experiments.abbie.report import speed_table

    if rows:
        print("forward and backward at equal flops", *speed_table(rows), sep="\n")
    for row in rows:
        if "error" in row:
            print(f"compiling failed: {row['error']}")


def _checked(options: argparse.Namespace) -> tuple[Settings, list[float], list[str]]:
    """Settings, learning rates and variants of a comparison, before anything is trained.

    Raises:
        UserError: an option is out of range, the corpus cannot be read, or what a plot needs is missing.
    """
    defaults = _DEFAULTS[options.flavor]
    for key in ("steps", "batch", "length", "learning_rates"):
        if getattr(options, key) is None:
            setattr(options, key, getattr(defaults, key))
    for key, least in _LEAST.items():
        require_flag(getattr(options, key) >= least, key, getattr(options, key), f"at least {least}")
    grid = command.learning_rates(options.learning_rates)
    variants = command.chosen(options.variants, "variants", list(VARIANTS))
    options.iterations = _numbers("iterations", options.iterations, 1, "1,2,4,8")
    require_flag(2 in options.iterations, "iterations", options.iterations, "with 2 among them, the trained number")
    options.steps = _numbers("steps", options.steps, 1, "500,1000,2000")
    settings = command.settings_of(options, Settings)
    command.check_run_arguments(options)
    from titan_ext.experiments.text import check_text

    check_text(settings)
    return settings, grid, variants


def _numbers(key: str, text: str, least: int, example: str) -> tuple[int, ...]:
    """The comma-separated whole numbers of a flag, ascending and distinct."""
    try:
        numbers = tuple(sorted({int(each) for each in text.split(",")}))
    except ValueError:
        numbers = ()
    fine = bool(numbers) and numbers[0] >= least
    require_flag(fine, key, text, f"numbers of at least {least}, such as {example}")
    return numbers
