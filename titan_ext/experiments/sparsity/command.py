"""SparsyFed (arXiv 2504.05153) against dense training and plain top-k pruning, at several sparsities.

A small Llama is trained at several sites in one process: the real outer loop, and bytes from its own ledger. "topk_0.95"
keeps the largest twentieth of the weights of all matrices before each round, "sparsyfed_0.95" too, with these matrices
under a power; "dense" averages all. Every arm is trained at the same learning rate, or tuned over several.

  loss         of the shared model after the last round, on documents that no site trains on; nats a token, and tokens are
               bytes; mean and standard deviation over the seeds
  sent         bytes that a site sends in all rounds, and in the last one
  density      share of the matrices' weights that the shared model has at the end
  regrown      share of weights that a site sends where it had received none, mean of the rounds after the first
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.errors import UserError
from titan_ext.experiments import command
from titan_ext.experiments.sparsity.arms import DENSE, PLAIN, POWER, Result, Settings, arm_names

HELP = "SparsyFed at 50 to 99% sparsity against dense and top-k: loss, bytes and regrowth"

_EXAMPLES = """\
examples:
  titan-ext bench sparsity --out runs/sparsity --plot runs/sparsity/loss       all arms at 3 seeds
  titan-ext bench sparsity --sparsities 0.9,0.95 --seeds 1                    a first look
"""
_SIZES: Numbers = {
    # default, least, help
    "dim": (64, 32, "width of the model, a multiple of 32"),
    "layers": (2, 1, "transformer blocks"),
    "steps": (320, 1, "inner steps, a multiple of --sync-every"),
    "sites": (4, 2, "number of sites"),
    "batch": (4, 1, "sequences a site and step"),
    "length": (64, 1, "tokens a sequence"),
    "sync_every": (16, 1, "inner steps between rounds"),
    "seeds": (3, 1, "runs of each arm at its learning rate"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, sparsities, tuning, and where results go."""
    command.begin(parser, _EXAMPLES)
    add_numbers(parser, _SIZES)
    parser.add_argument(
        "--sparsities", default="0.5,0.8,0.95,0.99", help="comma-separated shares of zeros (default: 0.5,0.8,0.95,0.99)"
    )
    parser.add_argument("--exponent", type=float, default=1.25, help="power of SparsyFed's layers (default: 1.25)")
    parser.add_argument("--learning-rates", default="4e-3", help="grid of learning rates (default: 4e-3 alone)")
    command.add_corpus(parser)
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the table, and return its figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, sparsities, grids = _checked(options)
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes
    from titan_ext.experiments.sparsity.train import train

    done = command.train_missing(
        options, settings, grids, train=train, arguments=(settings,), result_type=Result, describe=lambda arm: arm
    )
    found = tuned_outcomes(TunedOutcome, grids, options.seeds, done)
    rows = [_row(outcome) for outcome in found.values()]
    figures = {**asdict(settings), "seeds": options.seeds, "rows": rows, "claims": _claims(sparsities, found, rows)}
    _print(figures)
    if options.plot is not None:
        _plot(rows, options.plot)
    return figures


def _row(outcome: Any) -> dict[str, Any]:
    from titan_ext.experiments.report import number

    runs = outcome.runs

    def mean(name: str) -> float:
        return sum(getattr(each, name) for each in runs) / len(runs)

    return {
        "arm": outcome.method,
        "lr": outcome.lr,
        "loss": number(outcome.loss),
        "deviation": number(outcome.deviation),
        "losses": [number(loss) for loss in outcome.losses],
        "bytes_sent": round(mean("bytes_sent")),
        "bytes_last_round": round(mean("bytes_last_round")),
        "density": number(mean("density")),
        "regrown": number(mean("regrown"), 7),
    }


def _claims(sparsities: list[float], found: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from titan_ext.experiments.claims import SeedDifferences, claim

    by_arm, judged = {row["arm"]: row for row in rows}, []
    for sparsity in sparsities:
        ours, plain = f"{POWER}_{sparsity:g}", f"{PLAIN}_{sparsity:g}"
        differences = SeedDifferences.between(found[ours].losses, found[plain].losses)
        text = f"at {sparsity:.0%} SparsyFed's loss is below plain top-k's by more than noise"
        judged.append(claim(text, differences.is_below, f"loss {differences.text()}"))
        against = SeedDifferences.between(found[ours].losses, found[DENSE].losses)
        ratio = by_arm[DENSE]["bytes_sent"] / by_arm[ours]["bytes_sent"]
        text = f"at {sparsity:.0%} it sends fewer bytes than dense training, within noise of its loss"
        judged.append(
            claim(text, against.is_not_above and ratio > 1, f"loss {against.text()}; {ratio:.1f} times fewer bytes")
        )
        grown = SeedDifferences.between(*([run.regrown for run in found[arm].runs] for arm in (ours, plain)))
        text = f"at {sparsity:.0%} less grows again than under plain top-k, by more than noise"
        figures = f"{by_arm[ours]['regrown']:.4%} of the weights a round, against {by_arm[plain]['regrown']:.4%}"
        judged.append(claim(text, grown.is_below, figures))
    return judged


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.claims import print_claims
    from titan_ext.launcher.text import bytes_text, columns, number_text

    tokens = figures["sites"] * figures["batch"] * figures["length"]
    print(
        f"{figures['sites']} sites, {tokens:,} tokens of {figures['corpus']} a step, {figures['steps']} steps, "
        f"a round every {figures['sync_every']}, {figures['seeds']} seed(s)\n"
    )
    titles = ["arm", "lr", "loss", "+-", "seeds", "sent", "last round", "density", "regrown"]
    body = [
        [
            row["arm"],
            f"{row['lr']:g}",
            number_text(row["loss"], ".4f"),
            number_text(row["deviation"], ".4f"),
            " ".join(number_text(loss, ".4f") for loss in row["losses"]),
            bytes_text(row["bytes_sent"]),
            bytes_text(row["bytes_last_round"]),
            f"{row['density']:.2%}",
            f"{row['regrown']:.4%}",
        ]
        for row in figures["rows"]
    ]
    print(*columns([titles, *body]), sep="\n")
    print_claims("\nexpected, and what came out (noise: standard deviation over seeds)", figures["claims"])


def _plot(rows: list[dict[str, Any]], path: Any) -> None:
    from titan_ext.experiments.plots import new_figure, save

    figure = new_figure(7)
    axes = figure.subplots()
    for kind in (DENSE, PLAIN, POWER):
        chosen = [row for row in rows if row["arm"].partition("_")[0] == kind and row["loss"] is not None]
        errors = [row["deviation"] or 0.0 for row in chosen]
        axes.errorbar(
            [row["bytes_sent"] for row in chosen], [row["loss"] for row in chosen], errors, marker="o", label=kind
        )
    axes.set(xscale="log", xlabel="bytes that a site sends", ylabel="loss, nats a token")
    axes.legend()
    for file in save(figure, path):
        print(f"plot: {file}")


def _checked(options: argparse.Namespace) -> tuple[Settings, list[float], dict[str, list[float]]]:
    command.check_sizes(options, _SIZES)
    command.check_run_arguments(options)
    require_flag(options.exponent >= 1, "exponent", options.exponent, "at least 1")
    try:
        sparsities = sorted({float(each) for each in options.sparsities.split(",")})
    except ValueError:
        raise UserError(f"--sparsities {options.sparsities}: must be numbers, such as 0.5,0.95") from None
    fine = all(0 < each < 1 for each in sparsities)
    require_flag(fine, "sparsities", options.sparsities, "above 0 and below 1")
    settings = command.settings_of(options, Settings)
    grid = command.learning_rates(options.learning_rates)
    from titan_ext.experiments.text import check_text

    check_text(settings)
    return settings, sparsities, {arm: list(grid) for arm in arm_names(sparsities)}
