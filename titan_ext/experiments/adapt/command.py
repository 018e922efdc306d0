"""What weights by similarity to anchors are worth (ADAPT, arXiv 2605.05227) on text that is in part off-topic or noise.

A site for each target language. Of its sequences a part is of its target; the others are of the other sites' targets, of a
language of no target, and of letters without order. Anchors are held-out text of the target, and losses are measured on other
held-out text of it. All arms train on the same tokens. The first ones train each site alone:

  uniform              all count alike
  adapt                weights by ADAPT as the paper has it, with the model's own representation
  standardized         with embeddings centred and scores standardised, over some ten steps
  standardized_stale   the same with anchors read every --sync-every steps only
  bm25                 by BM25 of bytes against the anchors, without a model
  oracle               text of the target alone counts: what perfect weights of 0 and 1 come to

Those of "diloco" train one model by DiLoCo: with the site's own anchors ("_own"), or with those of all sites ("_shared").

  loss         mean over the sites of the loss on held-out text of their target, nats a byte
  less         mean difference to uniform weights, of sites alone or of DiLoCo, over the seeds, with its 95% interval
  own … noise  mean weight of a source in the second half of the steps
"""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.experiments import command

if TYPE_CHECKING:
    from titan_ext.experiments.adapt.arms import Settings

HELP = "ADAPT: loss on the target of weights by similarity to anchors, on text that is in part off-topic or noise"

_EXAMPLES = """\
examples:
  titan-ext bench adapt --out runs/adapt                                        made-up languages, three seeds
  titan-ext bench adapt --corpus FOLDER --targets en,fr --off-topic pl          a folder for each language
  titan-ext bench adapt --learning-rates 4e-3 --seeds 1                         a first look
"""
_SIZES: Numbers = {
    # default, least, help
    "dim": (64, 32, "width of the model, a multiple of 32"),
    "layers": (2, 1, "transformer blocks"),
    "steps": (320, 2, "inner steps, a multiple of --sync-every"),
    "batch": (8, 1, "sequences a site and step"),
    "length": (64, 4, "tokens a sequence"),
    "sync_every": (16, 1, "inner steps between rounds"),
    "anchors_every": (4, 1, "inner steps between two readings of the anchors, a divisor of --sync-every"),
    "seeds": (3, 1, "runs of each arm"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Text, sizes, and where results go."""
    command.begin(parser, _EXAMPLES)
    text = "with a folder for each language, and in that files train* and valid* (default: made-up languages)"
    parser.add_argument("--corpus", default="", metavar="FOLDER", help=text)
    parser.add_argument("--targets", default="a1,b1", help="languages, one a site (default: a1,b1)")
    parser.add_argument("--off-topic", default="c1", help="a language of no target (default: c1)")
    text = "of a site's sequences that are of its target (default: 0.4)"
    parser.add_argument("--own-share", type=float, default=0.4, help=text)
    add_numbers(parser, _SIZES)
    command.add_learning_rates(parser, "of each arm, tuned on the first seed")
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the table, and return its figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    from titan_ext.experiments.adapt import report
    from titan_ext.experiments.adapt.arms import ARMS, Result, described
    from titan_ext.experiments.adapt.outcome import claims, rows
    from titan_ext.experiments.adapt.train import train
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes

    settings = _checked(options)
    grids = dict.fromkeys(ARMS, command.learning_rates(options.learning_rates))
    done = command.train_missing(
        options, settings, grids, train=train, arguments=(settings,), result_type=Result, describe=described
    )
    found = tuned_outcomes(TunedOutcome, grids, options.seeds, done)
    figures = {**asdict(settings), "seeds": options.seeds, "rows": rows(found), "claims": claims(found)}
    report.show(figures)
    for file in report.draw(figures, options.plot) if options.plot is not None else ():
        print(f"plot: {file}")
    return figures


def _checked(options: argparse.Namespace) -> "Settings":
    from titan_ext.experiments.adapt.arms import Settings
    from titan_ext.experiments.adapt.text import check_text

    command.check_sizes(options, _SIZES)
    command.check_run_arguments(options)
    every = options.sync_every
    fine = every % options.anchors_every == 0
    require_flag(fine, "anchors_every", options.anchors_every, f"a divisor of --sync-every ({every})")
    require_flag(0 < options.own_share < 1, "own_share", options.own_share, "above 0 and below 1")
    settings = command.settings_of(options, Settings)
    fine = len(settings.names) > 1 and all(settings.names) and len(set(settings.names)) == len(settings.names)
    require_flag(fine, "targets", options.targets, "two or more languages, each once")
    fine = bool(settings.off_topic) and settings.off_topic not in settings.names
    require_flag(fine, "off_topic", options.off_topic, "a language that is no target")
    check_text(settings)
    return settings
