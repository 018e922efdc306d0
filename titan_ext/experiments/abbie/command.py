"""Perplexity of AbbIE's variants at other numbers of iterations than they were trained with, on real text.

A standard decoder, the recurrent-depth baseline, variant C and all readings of variant D are trained with 2
iterations (the standard decoder with 1) on the same tokens in the same order, at equal parameters, and evaluated on
documents that none is trained on. Tokens are bytes.

  perplexity     of a byte; mean and standard deviation over the seeds
  tail's input   its cosine with the tail's input at the trained number of iterations, and its norm as a multiple of
                 that one's: how far iterating leads away from what the tail has learned on
  speed          forward and backward of D against a standard decoder of as many blocks as D applies, which is equal
                 flops; memory is that of parameters, gradients and what forward keeps for backward

Readings of D: "prev" adds what the body was given, "input" the head's output; "final skip" adds it after the last
iteration too; "mean" halves the sum, "norm" divides it by its root mean square. "prev" and "input" are one training,
for they differ beyond 2 iterations only. The paper's gain beyond 2 iterations is at 200M and 350M parameters.

Runs go side by side, one for each core (on a GPU one after another). With --out each run is kept when it ends, and
the same command goes on where it was.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from titan_ext.experiments.abbie import options as command_line
from titan_ext.experiments.abbie.variants import describe, training_of
from titan_ext.experiments.flags import workers_and_threads

if TYPE_CHECKING:
    from titan_ext.experiments.abbie.settings import Result, Settings
    from titan_ext.experiments.convergence.settings import Run

HELP = "perplexity of AbbIE's variants over iterations, and speed at equal flops"

add_arguments = command_line.add_arguments


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, lr, variants = command_line.checked(options)
    from titan_ext.experiments.abbie.claims import claims
    from titan_ext.experiments.abbie.outcome import outcomes
    from titan_ext.experiments.abbie.plot import draw
    from titan_ext.experiments.abbie.report import rows
    from titan_ext.experiments.abbie.speed import speeds

    done = _trained(options, settings, lr, variants)
    found = outcomes(variants, settings.iterations, lr, options.seeds, done)
    figures = {**asdict(settings), "lr": lr, "seeds": options.seeds, "rows": rows(found.values())}
    figures["claims"] = claims(found, settings.iterations)
    _print(figures)
    if options.plot is not None:
        print("drawn:", *draw(figures["rows"], options.plot))
    figures["speed"] = list(speeds(settings, options.speed_turns)) if options.speed_turns else []
    _print_speed(figures["speed"])
    return figures


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.abbie.report import drifts, perplexities

    rows = figures["rows"]
    sizes = sorted({f"{row['parameters']:,}" for row in rows})
    print(
        f"{figures['flavor']}: {' or '.join(sizes)} parameters, {rows[0]['tokens']:,} tokens of {figures['corpus']}, "
        f"learning rate {figures['lr']:g}, {figures['seeds']} seed(s)\n"
    )
    print(*perplexities(rows), sep="\n")
    print("\ncosine with the tail's input at the trained number of iterations, and multiple of its norm")
    print(*drifts(rows), sep="\n")
    print("\nexpected, and what came out (noise: standard deviation over seeds)")
    for each in figures["claims"]:
        print(f"{'holds' if each['holds'] else 'does NOT hold'}: {each['claim']}\n    {each['figures']}")
    print(flush=True)


def _print_speed(rows: list[dict[str, Any]]) -> None:
    from titan_ext.experiments.abbie.report import speed_table

    if rows:
        print("forward and backward at equal flops", *speed_table(rows), sep="\n")
    for row in rows:
        if "error" in row:
            print(f"compiling failed: {row['error']}")


def _trained(
    options: argparse.Namespace, settings: "Settings", lr: float, variants: list[str]
) -> "Mapping[Run, Result]":
    """Every run that the comparison needs, from the store or trained now."""
    from titan_ext.experiments.abbie.settings import Result
    from titan_ext.experiments.abbie.train import Trainee
    from titan_ext.experiments.comparison import compare
    from titan_ext.experiments.store import Store
    from titan_ext.experiments.team import Team

    store = Store(options.out, settings, Result, describe)
    trainings = dict.fromkeys(training_of(variant) for variant in variants)
    workers, threads = workers_and_threads(options.workers, settings.device)
    with Team(Trainee, (settings, threads), workers) as team:
        return compare({training: [lr] for training in trainings}, options.seeds, store, team)
