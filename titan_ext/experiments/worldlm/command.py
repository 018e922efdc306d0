"""Whether key layers of each site's own pay (WorldLM, arXiv 2405.14446): a language at each site, related ones in federations.

All sites take as many inner steps on the same text. "local": each alone. "centralised": one model, gradients averaged at every
step. "fedavg", "diloco" and "hierarchical" (regions average four times as often): one model. "fedper": the last 30% of the
blocks and the head stay at their site. "worldlm": they go by attention over the tree; "_uniform" averages them in the
tree instead, "_fedatt" takes FedAtt's attention, in "_differences" they are compared by how they differ from the root's. In
"_swapped" two sites are in each other's federation, "_unrouted" without routing. With "_little_noise" and "_much_noise" every
update is clipped at 5 and noised, by a thousandth and a hundredth of that in each number, before it leaves its site.

  loss         mean over the sites of the loss on held-out text of their own language, nats a byte
  perplexity   of that; "less" is the mean difference of losses to fedavg over the seeds, with its 95% interval

In a made-up language a letter tells how likely the next one is, by 65% as in its family (the first letter of the name).
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.experiments import command

HELP = "WorldLM: perplexity by site of personal key layers, of one model for all, and of each site alone"

_EXAMPLES = """\
examples:
  titan-ext bench worldlm --out runs/worldlm                                    made-up languages, three seeds
  titan-ext bench worldlm --corpus FOLDER --federations en,de/es,fr             a folder for each language
  titan-ext bench worldlm --arms fedavg,worldlm --seeds 1                       a first look
"""
_SIZES: Numbers = {
    # default, least, help
    "dim": (64, 32, "width of the model, a multiple of 32"),
    "layers": (3, 2, "transformer blocks"),
    "steps": (320, 2, "inner steps, a multiple of --sync-every"),
    "batch": (4, 1, "sequences a site and step"),
    "length": (64, 4, "tokens a sequence"),
    "sync_every": (16, 2, "inner steps between rounds"),
    "seeds": (3, 1, "runs of each arm"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Text, sizes, and where results go."""
    command.begin(parser, _EXAMPLES)
    text = "with a folder for each language, and in that files train* and valid* (default: made-up languages)"
    parser.add_argument("--corpus", default="", metavar="FOLDER", help=text)
    sites = "languages, one a site, with a slash between federations (default: a1,a2,a3/b1,b2,b3)"
    parser.add_argument("--federations", default="a1,a2,a3/b1,b2,b3", help=sites)
    parser.add_argument("--arms", help="some of them, fedavg among them (default: all)")
    add_numbers(parser, _SIZES)
    parser.add_argument("--learning-rates", default="4e-3", help="grid of learning rates (default: 4e-3 alone)")
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the table, and return its figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    from titan_ext.experiments.languages import check_text
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes
    from titan_ext.experiments.worldlm.arms import ARMS, FEDAVG, Result, Settings
    from titan_ext.experiments.worldlm.train import train

    command.check_sizes(options, _SIZES)
    command.check_run_arguments(options)
    settings = command.settings_of(options, Settings)
    languages = settings.languages
    fine = len(settings.groups) > 1 and all(languages) and len(set(languages)) == len(languages)
    require_flag(fine, "federations", options.federations, "two or more, with languages that each stand once")
    arms = command.chosen(options.arms or ",".join(ARMS), "arms", ARMS)
    require_flag(FEDAVG in arms, "arms", options.arms, f"with {FEDAVG}, which the others are compared with")
    check_text(settings)
    grids = dict.fromkeys(arms, command.learning_rates(options.learning_rates))
    done = command.train_missing(
        options, settings, grids, train=train, arguments=(settings,), result_type=Result, describe=lambda arm: arm
    )
    found = tuned_outcomes(TunedOutcome, grids, options.seeds, done)
    rows = [_row(outcome, found[FEDAVG]) for outcome in found.values()]
    figures = {**asdict(settings), "seeds": options.seeds, "rows": rows, "claims": _claims(found)}
    _print(figures)
    if options.plot is not None:
        _plot(figures, options.plot)
    return figures


def _row(outcome: Any, reference: Any) -> dict[str, Any]:
    from titan_ext.experiments.claims import SeedDifferences
    from titan_ext.experiments.report import number

    less = SeedDifferences.between(outcome.losses, reference.losses)
    by_site = [[run.losses[site] for run in outcome.runs] for site in range(len(outcome.runs[0].losses))]
    return {
        "arm": outcome.method,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "perplexity": number(math.exp(outcome.loss)),
        "less": number(less.mean),
        "half_width": number(less.half_width),
        "by_site": [number(mean(losses)) if None not in losses else None for losses in by_site],
        "bytes_sent": outcome.runs[0].bytes_sent,
    }


def _claims(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the paper says of perplexity, as far as the arms are there."""
    from titan_ext.experiments.claims import SeedDifferences, claim
    from titan_ext.experiments.worldlm.arms import (
        DIFFERENCES,
        FEDAVG,
        FEDPER,
        LITTLE_NOISE,
        LOCAL,
        MUCH_NOISE,
        SWAPPED,
        SWAPPED_DIFFERENCES,
        UNROUTED,
        UNROUTED_DIFFERENCES,
        WORLDLM,
    )

    expected = [
        ("WorldLM is better than one model for all (the paper: up to 1.91 times in perplexity)", WORLDLM, FEDAVG),
        ("WorldLM is better than hierarchical averaging (the paper: 1.86 times)", WORLDLM, "hierarchical"),
        ("WorldLM is better than personal heads (the paper: 3.3 times)", WORLDLM, FEDPER),
        ("WorldLM is better than each site alone on its own text", WORLDLM, LOCAL),
        ("attention is better than averages in the same tree", WORLDLM, "worldlm_uniform"),
        ("sites in the wrong federation cost something (reviews: about twice the perplexity)", WORLDLM, UNROUTED),
        ("routing helps sites in the wrong federation", SWAPPED, UNROUTED),
        (
            "with little noise WorldLM is better than one model for all",
            f"worldlm_{LITTLE_NOISE}",
            f"fedavg_{LITTLE_NOISE}",
        ),
        (
            "with much noise too WorldLM is better than one model for all",
            f"worldlm_{MUCH_NOISE}",
            f"fedavg_{MUCH_NOISE}",
        ),
        ("by differences attention is better than averages", DIFFERENCES, "worldlm_uniform"),
        ("by differences routing helps sites in the wrong federation", SWAPPED_DIFFERENCES, UNROUTED_DIFFERENCES),
    ]
    judged = []
    for text, ours, theirs in expected:
        if ours in found and theirs in found:
            less = SeedDifferences.between(found[ours].losses, found[theirs].losses)
            ratio = math.exp(-less.mean) if math.isfinite(less.mean) else math.nan
            judged.append(claim(text, less.is_below, f"loss {less.text()}; perplexity {ratio:.3f} times as low"))
    return judged


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.claims import print_claims
    from titan_ext.launcher.text import columns, number_text

    languages = figures["federations"].replace("/", ",").split(",")
    print(
        f"federations: {figures['federations']}; {figures['steps']} steps, a round every {figures['sync_every']}, "
        f"{figures['seeds']} seed(s)\n"
    )
    titles = ["arm", "loss", "perplexity", "less", "+-", *languages, "MB sent"]
    body = [
        [
            row["arm"],
            number_text(row["loss"], ".4f"),
            number_text(row["perplexity"], ".3f"),
            number_text(row["less"], "+.4f"),
            number_text(row["half_width"], ".4f"),
            *(number_text(loss, ".4f") for loss in row["by_site"]),
            f"{row['bytes_sent'] / 1e6:.1f}",
        ]
        for row in figures["rows"]
    ]
    print(*columns([titles, *body]), sep="\n")
    print_claims("\nexpected, and what came out", figures["claims"])


def _plot(figures: Mapping[str, Any], path: Any) -> None:
    from titan_ext.experiments.plots import new_figure, save

    figure = new_figure(8)
    axes = figure.subplots()
    languages = figures["federations"].replace("/", ",").split(",")
    for row in figures["rows"]:
        axes.plot(languages, row["by_site"], marker="o", label=row["arm"])
    axes.set(xlabel="site", ylabel="loss on its own language, nats a byte")
    axes.legend(fontsize="small")
    for file in save(figure, path):
        print(f"plot: {file}")
