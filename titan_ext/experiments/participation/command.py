"""Convergence against participation: K of N data sources train in each round, drawn anew (Photon, arXiv 2411.02908).

Sources share out a corpus (or are parts of languages, with --languages), take their turns at two virtual sites of one
process, under the real outer loop, and their mean becomes the model. All arms take the same inner steps on the same
schedule, so an arm with fewer sources a round trains on fewer tokens. Each is tuned on one seed over a grid of learning
rates, and the best rate is run on all seeds.

  loss        on text that no source trains on, after the last round; nats a token, and tokens are bytes; mean and
              standard deviation over the seeds
  tokens      that all sources together have trained on
  common      the loss that every arm reaches, and the inner steps to it
  turns       rounds in which a source trained, of the one with fewest and of the one with most
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.experiments import command
from titan_ext.experiments.participation.arms import DEFAULT, Result, Settings, parse_arm

HELP = "loss against how many of how many data sources train in a round"

_EXAMPLES = """\
examples:
  titan-ext bench participation --out runs/participation --plot runs/participation.png
  titan-ext bench participation --arms 1of8,8of8 --seeds 1                       a first look
  titan-ext bench participation --languages CORPUS --arms 4of8,8of8,4of32        a folder for each language
"""
_SIZES: Numbers = {
    # default, least, help
    "dim": (64, 32, "width of the model, a multiple of 32"),
    "layers": (2, 1, "transformer blocks"),
    "steps": (384, 1, "inner steps, a multiple of --sync-every"),
    "sites": (2, 1, "virtual sites"),
    "batch": (4, 1, "sequences a source and step"),
    "length": (64, 1, "tokens a sequence"),
    "sync_every": (16, 1, "inner steps of a round"),
    "seeds": (3, 1, "runs of each arm at its best learning rate"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, arms, text, tuning, and where results go."""
    command.begin(parser, _EXAMPLES)
    add_numbers(parser, _SIZES)
    default = ",".join(DEFAULT)
    parser.add_argument("--arms", default=default, help=f"comma-separated KofN, K of N sources (default: {default})")
    parser.add_argument(
        "--source-optimizer",
        default="stateless",
        choices=["stateless", "stateful"],
        help="whether a source keeps its inner optimizer's states from turn to turn (default: stateless)",
    )
    command.add_learning_rates(parser, "grid of learning rates")
    command.add_corpus(parser)
    parser.add_argument(
        "--languages",
        default="",
        metavar="FOLDER",
        help="a folder for each language with files called train* and valid*, among which sources are dealt",
    )
    command.add_run_arguments(parser)


def record_name(options: argparse.Namespace) -> str:
    """One for the built-in text, one for languages."""
    return "participation_languages" if options.languages else "participation"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the table, and return its figures.

    Raises:
        UserError: an option is out of range, or the text cannot be read.
        RunError: a worker failed.
    """
    settings, grids = _checked(options)
    from titan_ext.experiments.participation import report
    from titan_ext.experiments.participation.train import train
    from titan_ext.experiments.report import tuned_outcomes

    done = command.train_missing(
        options, settings, grids, train=train, arguments=(settings,), result_type=Result, describe=lambda arm: arm
    )
    found = tuned_outcomes(report.Outcome, grids, options.seeds, done)
    rows = report.rows(found.values())
    figures = {**asdict(settings), "seeds": options.seeds, "rows": rows, "claims": report.claims(found)}
    _print(figures)
    if options.plot is not None:
        print("drawn:", *report.draw(found.values(), options.plot))
    return figures


def _print(figures: dict[str, Any]) -> None:
    from titan_ext.experiments.claims import print_claims
    from titan_ext.experiments.participation import report
    from titan_ext.experiments.report import rates_tried

    text = f"languages of {figures['languages']}" if figures["languages"] else figures["corpus"]
    print(
        f"{figures['steps']} inner steps, a round every {figures['sync_every']}, {figures['batch']} x {figures['length']} "
        f"tokens a source and step of {text}, {figures['source_optimizer']} sources, {figures['seeds']} seed(s)\n"
    )
    print(*report.table(figures["rows"]), sep="\n")
    print("\nloss by learning rate, on the first seed", *rates_tried(figures["rows"]), sep="\n")
    print_claims("\nexpected, and what came out (noise: standard deviation over seeds)", figures["claims"])


def _checked(options: argparse.Namespace) -> tuple[Settings, dict[str, list[float]]]:
    """The settings, and each arm's learning rates, before anything is trained."""
    command.check_sizes(options, _SIZES)
    arms = list(dict.fromkeys(options.arms.split(",")))
    largest = max(parse_arm(arm)[1] for arm in arms)
    fewest = min(parse_arm(arm)[1] for arm in arms)
    require_flag(
        options.sites <= fewest, "sites", options.sites, f"at most the {fewest} sources of the smallest population"
    )
    command.check_run_arguments(options)
    if options.languages:
        folder = Path(options.languages).expanduser()
        holds = folder.is_dir() and any(each.is_dir() for each in folder.iterdir())
        require_flag(holds, "languages", options.languages, "a folder that holds a folder for each language")
    settings = command.settings_of(options, Settings)
    grid = command.learning_rates(options.learning_rates)
    from titan_ext.experiments.participation.train import source_text, validation

    validation(settings)
    for source in (0, largest - 1):
        next(source_text(settings, 0, largest, source))
    return settings, {arm: list(grid) for arm in arms}
