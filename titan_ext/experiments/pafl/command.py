"""Which sites lose by taking part (PaFL, arXiv 2305.02728): languages of unequal size, each at a site of its own.

Each site trains alone, or all train one model by averaging every --sync-every steps, on as many tokens: as it is, or near
the received model: by a proximal term in all rounds, or by elastic weight consolidation or distillation in the second
half of them. The first language has all of its documents, each next one a quarter (--shrink) of the share before. After
the last round each site trains --adapt-steps by itself, as kept near the received model as before.

  loss       mean over the sites of the loss on held-out text of their language, nats a token, and tokens are bytes: of the
             shared model after the last round, or of each site's own where they train alone
  worst      of the site where it is highest; spread: standard deviation over the sites
  losing     sites whose loss is above that of their model alone after as many steps, mean over the seeds
  adapted    loss, and sites that lose, after the steps that each site trains by itself
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean, pstdev
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag
from titan_ext.experiments import command

HELP = "PaFL: how many sites lose by taking part, with regularisers and without"

_EXAMPLES = """\
examples:
  titan-ext bench pafl --corpus FOLDER --out runs/pafl                          all arms, three seeds
  titan-ext bench pafl --corpus FOLDER --languages en,de --seeds 1              a first look
"""
_SIZES: Numbers = {
    # default, least, help
    "dim": (64, 32, "width of the model, a multiple of 32"),
    "layers": (2, 1, "transformer blocks"),
    "steps": (320, 2, "inner steps with rounds, a multiple of twice --sync-every"),
    "adapt_steps": (32, 0, "inner steps of each site by itself after them"),
    "shrink": (4, 1, "each next site has one in so many of the share of documents before"),
    "batch": (4, 1, "sequences a site and step"),
    "length": (64, 1, "tokens a sequence"),
    "sync_every": (16, 1, "inner steps between rounds"),
    "seeds": (3, 1, "runs of each arm"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Corpus, sizes, and where results go."""
    command.begin(parser, _EXAMPLES)
    text = "with a folder for each language, and in that files train* and valid*"
    parser.add_argument("--corpus", required=True, metavar="FOLDER", help=text)
    parser.add_argument("--languages", default="en,es,fr,pl", help="one for each site (default: en,es,fr,pl)")
    add_numbers(parser, _SIZES)
    parser.add_argument("--learning-rates", default="4e-3", help="grid of learning rates (default: 4e-3 alone)")
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the table, and return its figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    from titan_ext.experiments.pafl.arms import ARMS, Result, Settings
    from titan_ext.experiments.pafl.train import check_corpus, train
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes

    check_numbers(options, _SIZES)
    require_flag(options.dim % 32 == 0, "dim", options.dim, "a multiple of 32")
    every = options.sync_every
    require_flag(
        options.steps % (2 * every) == 0, "steps", options.steps, f"a multiple of twice --sync-every ({every})"
    )
    command.check_run_arguments(options)
    languages = options.languages.split(",")
    fine = len(languages) > 1 and len(set(languages)) == len(languages)
    require_flag(fine, "languages", options.languages, "two or more names of folders, each once")
    settings = command.settings_of(options, Settings)
    check_corpus(settings)
    grid = command.learning_rates(options.learning_rates)
    grids = {arm: list(grid) for arm in ARMS}
    done = command.train_missing(
        options, settings, grids, train=train, arguments=(settings,), result_type=Result, describe=lambda arm: arm
    )
    found = tuned_outcomes(TunedOutcome, grids, options.seeds, done)
    rows = [_row(outcome, found) for outcome in found.values()]
    figures = {**asdict(settings), "seeds": options.seeds, "rows": rows, "claims": _claims(rows)}
    _print(figures)
    if options.plot is not None:
        _plot(figures, options.plot)
    return figures


def _row(outcome: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    from titan_ext.experiments.pafl.arms import ALONE
    from titan_ext.experiments.report import number

    alone = found[ALONE].runs
    by_site = [[loss for run in outcome.runs if (loss := run.losses[site]) is not None] for site in _sites(outcome)]
    means = [mean(losses) for losses in by_site if losses]
    return {
        "arm": outcome.method,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "deviation": number(outcome.deviation),
        "by_site": [number(each) for each in means],
        "worst": number(max(means)) if means else None,
        "spread": number(pstdev(means)) if means else None,
        "losing": _losing([run.losses for run in outcome.runs], [run.losses for run in alone]),
        "adapted": number(_mean([run.adapted for run in outcome.runs])),
        "losing_adapted": _losing([run.adapted for run in outcome.runs], [run.adapted for run in alone]),
    }


def _losing(ours: list[list[float | None]], alone: list[list[float | None]]) -> list[int]:
    """By seed how many sites have a higher loss than alone."""
    return [
        sum(own is None or (other is not None and own > other) for own, other in zip(*each, strict=True))
        for each in zip(ours, alone, strict=True)
    ]


def _mean(losses: list[list[float | None]]) -> float | None:
    every = [loss for run in losses for loss in run]
    return None if None in every else mean(loss for loss in every if loss is not None)


def _sites(outcome: Any) -> range:
    return range(len(outcome.runs[0].losses))


def _claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from titan_ext.experiments.claims import SeedDifferences, claim
    from titan_ext.experiments.pafl.arms import ALONE, TOGETHER

    by_arm, judged = {row["arm"]: row for row in rows}, []
    for key, when in (("losing", ""), ("losing_adapted", ", each model adapted to its site")):
        plain = by_arm[TOGETHER][key]
        text = f"some sites lose by taking part as it is{when}"
        judged.append(claim(text, mean(plain) > 0, f"{mean(plain):.2f} sites on average"))
        for arm in (each for each in by_arm if each not in (ALONE, TOGETHER)):
            fewer = SeedDifferences.between(by_arm[arm][key], plain)
            text = f"with {arm} fewer sites lose{when} (the paper: half as many with distillation on language)"
            figures = f"{mean(by_arm[arm][key]):.2f} against {mean(plain):.2f}; {fewer.text('+.2f')}"
            judged.append(claim(text, fewer.is_below, figures))
    return judged


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.claims import print_claims
    from titan_ext.launcher.text import columns, number_text

    languages = figures["languages"].split(",")
    parts = ", ".join(f"{name} 1/{figures['shrink'] ** place}" for place, name in enumerate(languages))
    print(
        f"sites: {parts} of the documents; {figures['steps']} steps, a round every {figures['sync_every']}, "
        f"then {figures['adapt_steps']} steps alone, "
        f"{figures['seeds']} seed(s)\n"
    )
    titles = ["arm", "lr", "loss", "+-", *languages, "worst", "spread", "losing", "adapted", "losing"]
    body = [
        [
            row["arm"],
            f"{row['lr']:g}",
            number_text(row["loss"], ".4f"),
            number_text(row["deviation"], ".4f"),
            *(number_text(loss, ".4f") for loss in row["by_site"]),
            number_text(row["worst"], ".4f"),
            number_text(row["spread"], ".4f"),
            f"{mean(row['losing']):.2f}",
            number_text(row["adapted"], ".4f"),
            f"{mean(row['losing_adapted']):.2f}",
        ]
        for row in figures["rows"]
    ]
    print(*columns([titles, *body]), sep="\n")
    print_claims("\nexpected, and what came out", figures["claims"])


def _plot(figures: Mapping[str, Any], path: Any) -> None:
    from titan_ext.experiments.plots import new_figure, save

    figure = new_figure(8)
    axes = figure.subplots()
    alone = figures["rows"][0]["by_site"]
    for row in figures["rows"][1:]:
        gaps = [own - theirs for own, theirs in zip(row["by_site"], alone, strict=True)]
        axes.plot(figures["languages"].split(","), gaps, marker="o", label=row["arm"])
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(xlabel="site, by size", ylabel="loss less that of the site alone, nats a token")
    axes.legend()
    for file in save(figure, path):
        print(f"plot: {file}")
