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
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.experiments import command
from titan_ext.experiments.convergence.methods import METHODS, Result, Settings, slow_beta
from titan_ext.experiments.tuning import rounded_rate

HELP = "loss, bytes and steps to a target of each method, against data parallelism"

_EXAMPLES = """\
examples:
  titan-ext bench convergence --out runs/convergence --plot runs/convergence/curves      all methods
  titan-ext bench convergence --methods ddp,local_adam,des_loc --seeds 1                 a first look at three
  titan-ext bench convergence --device cuda --dim 512 --layers 8 --length 512 --batch 16 --steps 8192 --rank 64
"""
_SIZES: Numbers = {
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
    command.begin(parser, _EXAMPLES)
    add_numbers(parser, _SIZES)
    names = ",".join(name for name, method in METHODS.items() if method.standard)
    parser.add_argument(
        "--methods",
        default=names,
        help=f"comma-separated (default: {names}); ddp_slow beside mt_dao tells the price of the slow momentum from that "
        "of rare averages",
    )
    command.add_learning_rates(parser, "grid of Adam's; the others' is 2 (MT-DAO) or 4 (low rank) times it")
    parser.add_argument(
        "--slow-beta",
        type=float,
        help="decay of MT-DAO's and LoRDO's momentum (default: one with a half-life of 1.7%% of the steps)",
    )
    parser.add_argument("--omega", type=float, default=0.9, help="weight of MT-DAO's momentum (default: 0.9)")
    command.add_corpus(parser)
    parser.add_argument("--target", type=float, help="validation loss to count steps to, in nats a token")
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, grids = _checked(options)
    from titan_ext.experiments.convergence.outcome import Outcome, claims, common_target
    from titan_ext.experiments.convergence.report import draw, rows
    from titan_ext.experiments.convergence.train import train
    from titan_ext.experiments.report import tuned_outcomes

    done = command.train_missing(
        options,
        settings,
        grids,
        train=train,
        arguments=(settings,),
        result_type=Result,
        describe=lambda method: METHODS[method].describe(settings),
    )
    found = tuned_outcomes(Outcome, grids, options.seeds, done)
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
    from titan_ext.experiments.claims import print_claims
    from titan_ext.experiments.convergence.report import table
    from titan_ext.experiments.report import rates_tried

    tokens = figures["sites"] * figures["batch"] * figures["length"]
    print(
        f"{figures['parameters']:,} parameters, {figures['sites']} sites, {tokens:,} tokens of {figures['corpus']} "
        f"a step, {figures['steps']} steps, synced every {figures['sync_every']}, {figures['seeds']} seed(s)\n"
    )
    print(*table(figures["rows"], figures["target"]), sep="\n")
    print("\nloss by learning rate, on the first seed", *rates_tried(figures["rows"]), sep="\n")
    title = "\nexpected from the papers, and what came out (noise: the larger standard deviation over seeds)"
    print_claims(title, figures["claims"])
    print(f"\n{figures['cpu_seconds']:,.0f} s of CPU time in all")


def _checked(options: argparse.Namespace) -> tuple[Settings, dict[str, list[float]]]:
    """The settings, and each method's learning rates, before anything is trained."""
    command.check_sizes(options, _SIZES)
    if options.slow_beta is None:
        options.slow_beta = slow_beta(options.steps)
    require_flag(0 <= options.slow_beta < 1, "slow_beta", options.slow_beta, "from 0 to below 1")
    require_flag(0 <= options.omega <= 1, "omega", options.omega, "from 0 to 1")
    command.check_run_arguments(options)
    settings = command.settings_of(options, Settings)
    grid = command.learning_rates(options.learning_rates)
    grids = {
        method: [rounded_rate(METHODS[method].lr_scale * lr) for lr in grid]
        for method in command.chosen(options.methods, "methods", list(METHODS))
    }
    from titan_ext.experiments.text import check_text

    check_text(settings)
    return settings, grids
