"""How well methods train beside data parallelism, on real text and for how many bytes.

A small model is trained at several sites in one process by each method: the real outer loop, its bytes from
its own ledger, and the same tokens in the same order for all. Every method is tuned on one seed over a grid of as
many learning rates; where the best lies at the edge, the grid is widened. The best rate is then run on all seeds.

  loss         on documents that no site trains on, of the parameters that the sites agree on, after the last step;
               nats a token, and tokens are bytes; mean and standard deviation over the seeds
  sent         bytes that a site sends in the run; DDP's are those of a ring all-reduce of fp32 gradients
  steps to     inner steps to --target; by default to the highest last loss, which all methods reach

Runs go side by side, one for each core (on a GPU one after another). With --out each run is kept when it ends, and
the same command goes on where it was.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from titan_ext.experiments.convergence.methods import METHODS, slow_beta
from titan_ext.experiments.convergence.plot import check_plot, draw
from titan_ext.experiments.convergence.settings import Settings
from titan_ext.experiments.flags import check_device, learning_rates, require, workers_and_threads
from titan_ext.experiments.tuning import rounded_rate

HELP = "loss, bytes and steps to a target of each method, against data parallelism"

_EXAMPLES = """\
examples:
  titan-ext bench convergence --out runs/convergence --plot runs/convergence/curves      all methods
  titan-ext bench convergence --methods ddp,local_adam,des_loc --seeds 1                 a first look at three
  titan-ext bench convergence --device cuda --dim 512 --layers 8 --length 512 --batch 16 --steps 8192 --rank 64
"""
_SIZES: dict[str, tuple[int, int, str]] = {
    # default, least, help
    "dim": (96, 32, "width of the model, a multiple of 32"),
    "layers": (2, 1, "transformer blocks"),
    "steps": (1152, 1, "inner steps, a multiple of --sync-every"),
    "sites": (4, 2, "number of sites"),
    "batch": (4, 1, "sequences a site and step"),
    "length": (64, 1, "tokens a sequence"),
    "sync_every": (32, 1, "inner steps between syncs (K)"),
    "rank": (16, 1, "rank of LoRDO and low-rank DDP"),
    "seeds": (3, 1, "runs of each method at its best learning rate"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, methods, tuning, and where results go."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    for key, (default, _, text) in _SIZES.items():
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    names = ",".join(name for name, method in METHODS.items() if method.standard)
    parser.add_argument(
        "--methods",
        default=names,
        help=f"comma-separated (default: {names}); ddp_slow beside mt_dao tells the price of the slow momentum from that "
        "of rare averages",
    )
    parser.add_argument(
        "--learning-rates",
        default="2e-3,4e-3,8e-3",
        help="grid of Adam's; the others' is 2 (MT-DAO) or 4 (low rank) times it (default: 2e-3,4e-3,8e-3)",
    )
    parser.add_argument(
        "--slow-beta",
        type=float,
        help="decay of MT-DAO's and LoRDO's momentum (default: one with a half-life of 1.7%% of the steps)",
    )
    parser.add_argument("--omega", type=float, default=0.9, help="weight of MT-DAO's momentum (default: 0.9)")
    parser.add_argument("--corpus", default="builtin:docs", help="file, folder, glob or builtin (default: builtin:docs)")
    parser.add_argument("--target", type=float, help="validation loss to count steps to, in nats a token")
    parser.add_argument("--device", default="cpu", help='"cpu", or the accelerator, such as "cuda" (default: cpu)')
    parser.add_argument("--workers", type=int, help="runs side by side (default: one for each core; 1 off the CPU)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep finished runs there, and use those that are")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw curves: PATH.png, PATH.svg (needs matplotlib)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, grids = _checked(options)
    from titan_ext.experiments.comparison import compare
    from titan_ext.experiments.convergence.claims import claims
    from titan_ext.experiments.convergence.outcome import outcomes
    from titan_ext.experiments.convergence.report import common_target, rows
    from titan_ext.experiments.convergence.settings import Result
    from titan_ext.experiments.convergence.train import Trainee
    from titan_ext.experiments.store import Store
    from titan_ext.experiments.team import Team

    workers, threads = workers_and_threads(options.workers, settings.device)
    store = Store(options.out, settings, Result, lambda method: METHODS[method].describe(settings))
    with Team(Trainee, (settings, threads), workers) as team:
        done = compare(grids, options.seeds, store, team)
    found = outcomes(grids, options.seeds, done)
    target = options.target if options.target is not None else common_target(found.values())
    figures = {
        "parameters": next(iter(done.values())).parameters,
        **asdict(settings),
        "seeds": options.seeds,
        "target": target,
        "rows": rows(found.values(), settings.sites, target),
        "claims": claims(found),
        "cpu_seconds": round(sum(result.cpu_seconds for result in done.values()), 1),
    }
    _print(figures)
    if options.plot is not None:
        print("drawn:", *draw(found.values(), options.plot))
    return figures


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.convergence.report import rates_tried, table

    tokens = figures["sites"] * figures["batch"] * figures["length"]
    print(
        f"{figures['parameters']:,} parameters, {figures['sites']} sites, {tokens:,} tokens of {figures['corpus']} "
        f"a step, {figures['steps']} steps, synced every {figures['sync_every']}, {figures['seeds']} seed(s)\n"
    )
    print(*table(figures["rows"], figures["target"]), sep="\n")
    print("\nloss by learning rate, on the first seed", *rates_tried(figures["rows"]), sep="\n")
    print("\nexpected from the papers, and what came out (noise: the larger standard deviation over seeds)")
    for each in figures["claims"]:
        print(f"{'holds' if each['holds'] else 'does NOT hold'}: {each['claim']}\n    {each['figures']}")
    print(f"\n{figures['cpu_seconds']:,.0f} s of CPU time in all")


def _checked(options: argparse.Namespace) -> tuple[Settings, dict[str, list[float]]]:
    """The settings, and each method's learning rates."""
    for key, (_, least, _) in _SIZES.items():
        require(getattr(options, key) >= least, key, getattr(options, key), f"at least {least}")
    every = options.sync_every
    require(options.dim % 32 == 0, "dim", options.dim, "a multiple of 32")
    require(options.steps % every == 0, "steps", options.steps, f"a multiple of --sync-every ({every})")
    if options.slow_beta is None:
        options.slow_beta = slow_beta(options.steps)
    require(0 <= options.slow_beta < 1, "slow_beta", options.slow_beta, "from 0 to below 1")
    require(0 <= options.omega <= 1, "omega", options.omega, "from 0 to 1")
    require(options.workers is None or options.workers >= 1, "workers", options.workers, "at least 1")
    require(options.target is None or math.isfinite(options.target), "target", options.target, "a number")
    if options.plot is not None:
        check_plot(options.plot)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    grids = _grids(options.methods, options.learning_rates)
    _check_surroundings(settings)
    return settings, grids


def _grids(methods: str, rates: str) -> dict[str, list[float]]:
    grid = learning_rates(rates)
    for method in methods.split(","):
        require(method in METHODS, "methods", method, f"of {', '.join(METHODS)}")
    return {method: [rounded_rate(METHODS[method].lr_scale * lr) for lr in grid] for method in methods.split(",")}


def _check_surroundings(settings: Settings) -> None:
    """Before any worker is started: the device is there, and the corpus has text."""
    from titan_ext.experiments.convergence.text import training_text, validation_text

    check_device(settings.device)
    validation_text(settings)
    next(training_text(settings, seed=0))
