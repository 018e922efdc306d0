"""One learning rate for all widths: muP (Tensor Programs V, arXiv 2203.03466) against the standard parametrisation.

First a coordinate check: how much a few steps change what each part of the model puts out, by width. Under muP no part's
change grows with the width; the power that it grows by is printed. With --check that is all. Then, for each width and
with muP and without, a grid of learning rates is tried on one seed, and the best rate is run on all seeds, as is the one that is
best for the smallest width.

  best lr      of the grid, widened while it lies at the edge
  loss         on documents that are not trained on; nats a token, and tokens are bytes; mean and deviation over the seeds
  at base lr   the same at the rate that is best for the smallest width
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag
from titan_ext.errors import UserError
from titan_ext.experiments import command
from titan_ext.experiments.mup.arms import ARMS, Result, Settings, method_of

HELP = "muP: coordinate check, and the best learning rate over widths with it and without"

_EXAMPLES = """\
examples:
  titan-ext bench mup --check                                      the coordinate check alone
  titan-ext bench mup --out runs/mup --plot runs/mup/transfer      both, with a plot of loss over learning rates
  titan-ext bench mup --device cuda --base-dim 256 --dims 256,1024,4096 --layers 8 --length 512 --steps 2000
"""
_SIZES: Numbers = {
    # default, least, help
    "base_dim": (32, 32, "width whose learning rate is to hold for all, a multiple of 32"),
    "layers": (2, 1, "transformer blocks"),
    "steps": (200, 10, "steps of each run"),
    "batch": (8, 1, "sequences a step"),
    "length": (64, 1, "tokens a sequence"),
    "seeds": (3, 1, "runs of each arm at its best learning rate"),
    "check_steps": (4, 1, "steps of the coordinate check"),
}
_NOT_GROWING = 0.25
"""Power of the width up to which a change counts as not growing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes, widths, tuning, and where results go."""
    command.begin(parser, _EXAMPLES)
    add_numbers(parser, _SIZES)
    parser.add_argument("--dims", default="32,64,128", help="comma-separated widths (default: 32,64,128)")
    parser.add_argument("--check", action="store_true", help="the coordinate check alone")
    parser.add_argument("--check-lr", type=float, default=1e-2, help="its learning rate (default: 1e-2)")
    command.add_learning_rates(parser, "grid of learning rates", "2e-3,4e-3,8e-3,1.6e-2")
    command.add_corpus(parser)
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check coordinates, train what is missing, print tables, and return the figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, dims, grid = _checked(options)
    checked = _coordinates(settings, dims, options)
    if options.check:
        return {**asdict(settings), **checked}
    from titan_ext.experiments.mup.train import train
    from titan_ext.experiments.report import TunedOutcome, tuned_outcomes

    grids = {method_of(arm, dim): list(grid) for arm in ARMS for dim in dims}

    def trained(of: Mapping[str, Sequence[float]]) -> dict[str, TunedOutcome]:
        done = command.train_missing(
            options, settings, of, train=train, arguments=(settings,), result_type=Result, describe=lambda arm: arm
        )
        return tuned_outcomes(TunedOutcome, of, options.seeds, done)

    best = trained(grids)
    at_base = trained({method_of(arm, dim): [best[method_of(arm, dims[0])].lr] for arm in ARMS for dim in dims})
    rows = _rows(best, at_base)
    figures = {**asdict(settings), "seeds": options.seeds, **checked, "rows": rows}
    figures["claims"] = checked["claims"] + _transfers(rows)
    _print(figures)
    if options.plot is not None:
        _plot(rows, options.plot)
    return figures


def _coordinates(settings: Settings, dims: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    from titan_ext.experiments.claims import claim, print_claims
    from titan_ext.experiments.mup.train import coordinates, growth
    from titan_ext.launcher.text import columns

    found = {arm: coordinates(settings, arm, dims, options.check_lr, options.check_steps, 0) for arm in ARMS}
    powers = {arm: growth(changes) for arm, changes in found.items()}
    print(f"coordinate check: mean change of an element after {options.check_steps} steps at {options.check_lr:g}\n")
    titles = ["part", *(f"{arm} {dim}" for arm in ARMS for dim in dims), *(f"{arm} power" for arm in ARMS)]
    body = [
        [part, *(f"{found[a][d][part]:.4f}" for a in ARMS for d in dims), *(f"{powers[a][part]:+.2f}" for a in ARMS)]
        for part in powers["mup"]
    ]
    print(*columns([titles, *body]), sep="\n", flush=True)
    most = {arm: max(each.values()) for arm, each in powers.items()}
    text = f"under muP no part's change grows with the width (power at most {_NOT_GROWING})"
    claims = [
        claim(text, most["mup"] <= _NOT_GROWING, f"largest power {most['mup']:+.2f}"),
        claim("without it some part's does", most["standard"] > _NOT_GROWING, f"largest {most['standard']:+.2f}"),
    ]
    print_claims("\nexpected, and what came out", claims)
    return {"coordinates": {arm: {str(d): each for d, each in found[arm].items()} for arm in ARMS}, "claims": claims}


def _rows(best: Mapping[str, Any], at_base: Mapping[str, Any]) -> list[dict[str, Any]]:
    from titan_ext.experiments.mup.arms import arm_and_dim
    from titan_ext.experiments.report import grid_figures, number

    rows = []
    for method, outcome in best.items():
        arm, dim = arm_and_dim(method)
        rows.append(
            {
                "label": method,
                "arm": arm,
                "dim": dim,
                "lr": outcome.lr,
                "loss": number(outcome.loss),
                "deviation": number(outcome.deviation),
                "losses": [number(loss) for loss in outcome.losses],
                "loss_at_base_lr": number(at_base[method].loss),
                "losses_at_base_lr": [number(loss) for loss in at_base[method].losses],
                "grid": grid_figures(outcome),
            }
        )
    return rows


def _transfers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether from the smallest width to the widest the best rate moves less under muP, and the smallest's costs less."""
    from titan_ext.experiments.claims import SeedDifferences, claim

    moved, cost = {}, {}
    for arm in ARMS:
        of = [row for row in rows if row["arm"] == arm]
        moved[arm] = math.log2(of[-1]["lr"] / of[0]["lr"])
        losses = [
            [math.inf if each is None else each for each in of[-1][key]] for key in ("losses_at_base_lr", "losses")
        ]
        cost[arm] = SeedDifferences.between(*losses)
    less = SeedDifferences.between(cost["mup"].values, cost["standard"].values)
    rates = ", ".join(f"{arm}: by a factor of {2**each:g}" for arm, each in moved.items())
    costs = ", ".join(f"{arm}: {each.mean:+.4f}" for arm, each in cost.items())
    return [
        claim(
            "from the smallest width to the widest the best learning rate moves less under muP",
            abs(moved["mup"]) < abs(moved["standard"]),
            rates,
        ),
        claim(
            "at the widest, the best rate of the smallest costs less loss under muP, by more than noise",
            less.is_below,
            f"{costs}; less: {less.text()}",
        ),
    ]


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.claims import print_claims
    from titan_ext.experiments.report import rates_tried
    from titan_ext.launcher.text import columns, number_text

    print(f"\n{figures['steps']} steps of {figures['batch'] * figures['length']} tokens, {figures['seeds']} seed(s)\n")
    titles = ["arm", "width", "best lr", "loss", "+-", "at base lr"]
    body = [
        [
            row["arm"],
            str(row["dim"]),
            f"{row['lr']:g}",
            number_text(row["loss"], ".4f"),
            number_text(row["deviation"], ".4f"),
            number_text(row["loss_at_base_lr"], ".4f"),
        ]
        for row in figures["rows"]
    ]
    print(*columns([titles, *body]), sep="\n")
    print("\nloss by learning rate, on the first seed", *rates_tried(figures["rows"]), sep="\n")
    print_claims("\nexpected, and what came out", figures["claims"])


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from titan_ext.experiments.plots import new_figure, save

    figure = new_figure(10)
    for axes, arm in zip(figure.subplots(1, len(ARMS), sharey=True), ARMS, strict=True):
        for row in (each for each in rows if each["arm"] == arm):
            pairs = sorted((float(lr), loss) for lr, loss in row["grid"].items() if loss is not None)
            axes.plot(*zip(*pairs, strict=True), marker="o", label=f"width {row['dim']}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats a token", title=arm)
        axes.legend()
    for file in save(figure, path):
        print(f"plot: {file}")


def _checked(options: argparse.Namespace) -> tuple[Settings, list[int], list[float]]:
    check_numbers(options, _SIZES)
    command.check_run_arguments(options)
    try:
        dims = sorted({int(each) for each in options.dims.split(",")})
    except ValueError:
        raise UserError(f"--dims {options.dims}: must be whole numbers, such as 32,64,128") from None
    fine = len(dims) > 1 and all(dim >= 32 and dim % 32 == 0 for dim in dims)
    require_flag(fine, "dims", options.dims, "two or more multiples of 32")
    require_flag(options.base_dim % 32 == 0, "base_dim", options.base_dim, "a multiple of 32")
    require_flag(0 < options.check_lr < math.inf, "check_lr", options.check_lr, "above 0")
    chosen: dict[str, Any] = {each.name: getattr(options, each.name, 1) for each in fields(Settings)}
    settings = Settings(**chosen)
    from titan_ext.experiments.text import check_text

    grid = command.learning_rates(options.learning_rates)
    check_text(settings)
    return settings, dims, grid
