"""Experts shared out over sites (FoMoE, arXiv 2606.19025) against all experts at every site, at equal tokens.

A small mixture of experts is trained at several sites in one process by DiLoCo: the real outer loop, and bytes from
its own ledger. Every arm is tuned on one seed over a grid of learning rates, and the best rate is run on all seeds.

  loss         on documents that no site trains on, of the model with every expert, after the last round; nats a
               token, and tokens are bytes; mean and standard deviation over the seeds
  at a site    the same of the sites' own models, which skip the experts that they do not hold
  sent         bytes that a site sends in a round, by the ledger, and by the formula
  evenness     entropy of the routing over experts, 1 where all are used alike
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.experiments import command
from titan_ext.experiments.fomoe.arms import Result, Settings, arms

HELP = "experts shared out over sites: loss and bytes against experts that are everywhere"

_EXAMPLES = """\
examples:
  titan-ext bench fomoe --out runs/fomoe                          one copy of each expert, two, … and one everywhere
  titan-ext bench fomoe --arms copies_1,full --seeds 1            a first look
  titan-ext bench fomoe --device cuda --dim 512 --layers 8 --experts 32 --expert-dim 512 --length 512 --steps 4096
"""
_SIZES: Numbers = {
    # default, least, help
    "dim": (64, 32, "width of the model, a multiple of 32"),
    "layers": (2, 1, "transformer blocks"),
    "experts": (8, 2, "experts of a layer, a multiple of --sites"),
    "top_k": (2, 1, "experts that a token is routed to"),
    "expert_dim": (64, 1, "hidden width of an expert"),
    "steps": (384, 1, "inner steps, a multiple of --sync-every"),
    "sites": (4, 2, "number of sites"),
    "batch": (4, 1, "sequences a site and step"),
    "length": (64, 1, "tokens a sequence"),
    "sync_every": (16, 1, "inner steps between rounds"),
    "seeds": (3, 1, "runs of each arm at its best learning rate"),
}

_UNEVEN_BYTES = 8
"""An element of each of two sums, of parameters and of routers' biases: who owns it where shares are not even."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, arms, tuning, and where results go."""
    command.begin(parser, _EXAMPLES)
    add_numbers(parser, _SIZES)
    parser.add_argument("--arms", help="comma-separated: copies_1, copies_2, … and full (default: all)")
    command.add_learning_rates(parser, "grid of learning rates")
    command.add_corpus(parser)
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the table, and return its figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, grids = _checked(options)
    from titan_ext.experiments.fomoe.report import draw, rows
    from titan_ext.experiments.fomoe.train import train
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes

    done = command.train_missing(
        options, settings, grids, train=train, arguments=(settings,), result_type=Result, describe=lambda arm: arm
    )
    found = tuned_outcomes(TunedOutcome, grids, options.seeds, done)
    figures = {**asdict(settings), "seeds": options.seeds, "rows": rows(settings, found.values())}
    figures["claims"] = _claims(found, figures["rows"])
    _print(figures)
    if options.plot is not None:
        print("drawn:", *draw(figures["rows"], options.plot))
    return figures


def _claims(found: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from titan_ext.experiments.claims import SeedDifferences, claim

    sent = [each for row in rows for each in row["bytes_a_round"] if abs(each - row["expected_bytes"]) > _UNEVEN_BYTES]
    judged = [claim("the ledger's bytes are those of the formula", not sent, f"{len(sent)} sites differ")]
    for arm in (each for each in found if each != "full" and "full" in found):
        differences = SeedDifferences.between(found[arm].losses, found["full"].losses)
        ours, theirs = (next(row["expected_bytes"] for row in rows if row["arm"] == each) for each in (arm, "full"))
        text = f"{arm} is within noise of full replication at fewer bytes"
        held = differences.is_not_above and ours < theirs
        judged.append(claim(text, held, f"loss {differences.text()}; {theirs / ours:.2f} times fewer bytes a round"))
    return judged


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.claims import print_claims
    from titan_ext.experiments.fomoe.report import table
    from titan_ext.experiments.report import rates_tried

    tokens = figures["sites"] * figures["batch"] * figures["length"]
    print(
        f"{figures['sites']} sites, {figures['experts']} experts, {tokens:,} tokens of {figures['corpus']} a step, "
        f"{figures['steps']} steps, a round every {figures['sync_every']}, {figures['seeds']} seed(s)\n"
    )
    print(*table(figures["rows"]), sep="\n")
    print("\nloss by learning rate, on the first seed", *rates_tried(figures["rows"]), sep="\n")
    print_claims("\nexpected, and what came out (noise: standard deviation over seeds)", figures["claims"])


def _checked(options: argparse.Namespace) -> tuple[Settings, dict[str, list[float]]]:
    """The settings, and each arm's learning rates, before anything is trained."""
    command.check_sizes(options, _SIZES)
    sites = options.sites
    require_flag(options.experts % sites == 0, "experts", options.experts, f"a multiple of --sites ({sites})")
    require_flag(options.top_k <= options.experts, "top_k", options.top_k, f"at most --experts ({options.experts})")
    command.check_run_arguments(options)
    settings = command.settings_of(options, Settings)
    known = list(arms(sites))
    chosen = known if options.arms is None else command.chosen(options.arms, "arms", known)
    grid = command.learning_rates(options.learning_rates)
    from titan_ext.experiments.text import check_text

    check_text(settings)
    return settings, {arm: list(grid) for arm in chosen}
