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
from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.experiments import command
from titan_ext.experiments.adapt.arms import (
    ADAPT,
    ARMS,
    BM25,
    ORACLE,
    PLAIN,
    SOURCES,
    STALE,
    STANDARDIZED,
    UNIFORM,
    Result,
    Settings,
)

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
_GAIN = "has a lower loss on the target than uniform weights"
_EXPECTED = (
    (f"there is something to gain: the oracle {_GAIN}", ORACLE, UNIFORM),
    (f"ADAPT as the paper has it {_GAIN}", PLAIN, UNIFORM),
    (f"ADAPT with centred and standardised scores {_GAIN}", STANDARDIZED, UNIFORM),
    (f"ADAPT by BM25 {_GAIN}", BM25, UNIFORM),
    ("standardised scores need anchors that are read often", STANDARDIZED, STALE),
    *(
        (f"under DiLoCo, {name}: ADAPT with anchors of {whose} {_GAIN}", f"diloco_{name}_{kind}", "diloco_uniform")
        for name in (PLAIN, STANDARDIZED)
        for kind, whose in (("own", "the site"), ("shared", "all sites"))
    ),
    *(
        (
            f"under DiLoCo, {name}: shared anchors are better for the one model than each site's own",
            f"diloco_{name}_shared",
            f"diloco_{name}_own",
        )
        for name in (PLAIN, STANDARDIZED, ORACLE)
    ),
)
"""A claim, the arm whose loss is to be lower, and the other one."""


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
    from titan_ext.experiments.adapt.train import train
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes

    settings = _checked(options)
    grids = dict.fromkeys(ARMS, command.learning_rates(options.learning_rates))
    done = command.train_missing(
        options, settings, grids, train=train, arguments=(settings,), result_type=Result, describe=_described
    )
    found = tuned_outcomes(TunedOutcome, grids, options.seeds, done)
    rows = [_row(outcome, found) for outcome in found.values()]
    figures = {**asdict(settings), "seeds": options.seeds, "rows": rows, "claims": _claims(found)}
    _print(figures)
    if options.plot is not None:
        _plot(figures, options.plot)
    return figures


def _described(arm: str) -> object:
    return [asdict(ARMS[arm]), ADAPT.get(ARMS[arm].weighting)]


def _row(outcome: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    from titan_ext.experiments.claims import SeedDifferences
    from titan_ext.experiments.report import grid_figures, number

    reference = found["diloco_uniform" if ARMS[outcome.method].together else UNIFORM]
    less = SeedDifferences.between(outcome.losses, reference.losses)
    by_source = {name: _weights(outcome, name) for name in SOURCES}
    return {
        "label": outcome.method,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "deviation": number(outcome.deviation),
        "less": number(less.mean),
        "less_half_width": number(less.half_width),
        **{name: number(mean(each), 4) if each else None for name, each in by_source.items()},
        "curve": _curve(outcome),
        "grid": grid_figures(outcome),
    }


def _weights(outcome: Any, source: str) -> list[float]:
    """Mean weight of a source in the second half of each seed's run; empty for arms without ADAPT."""
    place = SOURCES.index(source)
    halves = [run.weights[len(run.weights) // 2 :] for run in outcome.runs]
    known = [[each[place] for each in half if each[place] is not None] for half in halves]
    return [mean(each) for each in known if each]


def _curve(outcome: Any) -> list[list[float | None]]:
    """By ``sync_every`` steps the mean weight of each source, of the first seed."""
    from titan_ext.experiments.report import number

    return [[number(weight, 4) for weight in each] for each in outcome.runs[0].weights]


def _claims(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    from titan_ext.experiments.claims import SeedDifferences, claim

    judged = []
    for text, ours, theirs in _EXPECTED:
        less = SeedDifferences.between(found[ours].losses, found[theirs].losses)
        judged.append(claim(text, less.is_below, f"loss {less.text()}"))
    for arm in (PLAIN, STANDARDIZED, BM25):
        for source in ("noise", "off_topic"):
            pair = [_weights(found[arm], each) for each in (source, "own")]
            if len(pair[0]) == len(pair[1]) == len(found[arm].runs):
                less = SeedDifferences.between(*pair)
                text = f"{arm}: {source.replace('_', '-')} text weighs less than the site's own target"
                judged.append(claim(text, less.is_below, f"weight {mean(pair[0]):.3f} against {mean(pair[1]):.3f}"))
    return judged


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.claims import print_claims
    from titan_ext.experiments.report import rates_tried
    from titan_ext.launcher.text import columns, number_text

    print(
        f"targets: {figures['targets']}, {figures['own_share']:.0%} of a site's sequences each; {figures['steps']} steps, "
        f"a round every {figures['sync_every']}, {figures['seeds']} seed(s)\n"
    )
    titles = ["arm", "lr", "loss", "+-", "less", "+-", *SOURCES]
    body = [
        [
            row["label"],
            f"{row['lr']:g}",
            number_text(row["loss"], ".4f"),
            number_text(row["deviation"], ".4f"),
            number_text(row["less"], "+.4f"),
            number_text(row["less_half_width"], ".4f"),
            *(number_text(row[name], ".3f") for name in SOURCES),
        ]
        for row in figures["rows"]
    ]
    print(*columns([titles, *body]), sep="\n")
    print("", *rates_tried(figures["rows"]), sep="\n")
    print_claims("\nexpected, and what came out (noise: standard deviation over seeds)", figures["claims"])


def _plot(figures: Mapping[str, Any], path: Any) -> None:
    """Each arm's loss, and beside it the weights of the sources over the steps under standardised scores."""
    from titan_ext.experiments.plots import new_figure, save

    figure = new_figure(12)
    losses, weights = figure.subplots(1, 2)
    rows = [row for row in figures["rows"] if row["loss"] is not None]
    names, values = [row["label"] for row in rows], [row["loss"] for row in rows]
    losses.errorbar(values, names, xerr=[row["deviation"] or 0.0 for row in rows], fmt="o", capsize=3)
    losses.invert_yaxis()
    losses.set(xlabel="loss on the target, nats a byte")
    chosen = next(row for row in figures["rows"] if row["label"] == STANDARDIZED)
    steps = [(place + 1) * figures["sync_every"] for place in range(len(chosen["curve"]))]
    for name, curve in zip(SOURCES, zip(*chosen["curve"]), strict=True):
        weights.plot(steps, [float("nan") if each is None else each for each in curve], label=name)
    weights.set(xlabel="inner steps", ylabel=f"mean weight ({STANDARDIZED})", ylim=(0, 1))
    weights.legend()
    for file in save(figure, path):
        print(f"plot: {file}")


def _checked(options: argparse.Namespace) -> Settings:
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
