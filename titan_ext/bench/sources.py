"""Thousands of data sources on a few virtual sites of one process: seconds a round, idle time and memory.

Each virtual site has one model and the real outer loop; the sources of a round are placed on them, train one after the
other, and only a site's mean travels (Pollen, arXiv 2306.17453). Sources have between one and ``--most-batches`` batches
of random numbers, a few of them most of all; virtual sites share this machine's cores. The table has, for few sources and
for all,

  in turn / longest first   how sources are placed: dealt out, or by the time model that the first round has taught;
  s/round                   seconds of a round, exchange included: median of the rounds after the first;
  idle                      part of the virtual sites' time in which they wait for the slowest of them;
  memory                    peak of the process so far, beyond what it held before the first population.
"""

import argparse
import gc
import random
import resource
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag

if TYPE_CHECKING:
    from torch import nn

HELP = "seconds a round and memory of thousands of data sources on a few virtual sites of one process"

_SIZES: Numbers = {
    # default, least, help
    "sources": (1000, 1, "data sources"),
    "few": (10, 1, "sources of the population that memory is compared with"),
    "sites": (4, 2, "virtual sites"),
    "rounds": (4, 2, "rounds of each population"),
    "dim": (128, 1, "width of the model, of two layers"),
    "batch": (16, 1, "rows of a batch"),
    "most_batches": (40, 1, "batches of the largest source"),
}
_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many sources, virtual sites and rounds."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_numbers(parser, _SIZES)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return its figures.

    Raises:
        UserError: an option is out of range.
    """
    check_numbers(options, _SIZES)
    require_flag(options.few <= options.sources, "few", options.few, f"at most --sources ({options.sources})")
    rows = []
    before = None
    for sources, learns in ((options.few, True), (options.sources, False), (options.sources, True)):
        row = _measured(options, sources, learns)
        before = row["peak_mib"] - row["grown_mib"] if before is None else before
        rows.append({**row, "beyond_start_mib": round(row["peak_mib"] - before, 1)})
    _print(options, rows)
    return {**{key: getattr(options, key) for key in _SIZES}, "rows": rows}


def _measured(options: argparse.Namespace, sources: int, learns: bool) -> dict[str, Any]:
    from titan_ext.semi_sync import SemiSyncConfig
    from titan_ext.semi_sync.testing.population import Population

    gc.collect()
    before = _peak_mib()
    sizes = source_sizes(sources, options.most_batches)
    population = Population(
        SemiSyncConfig(method="local_sgd", sync_every=1, weighting="site"),
        [_model(options.dim) for _ in range(options.sites)],
        sizes,
        partial(_train, sizes, options),
        learns=learns,
    )
    rounds = [population.round() for _ in range(options.rounds)]
    population.close()
    later = rounds[1:]
    return {
        "sources": sources,
        "placement": "longest first" if learns else "in turn",
        "seconds_a_round": round(median(each.seconds for each in later), 3),
        "idle": round(median(each.idle for each in later), 4),
        "batches_a_round": sum(sizes),
        "peak_mib": round(_peak_mib(), 1),
        "grown_mib": round(_peak_mib() - before, 1),
    }


def source_sizes(sources: int, most: int) -> list[int]:
    """Batches of each source: most are small, a few large, from a fixed seed."""
    draw = random.Random(0)
    return [max(1, round(most * draw.random() ** 3)) for _ in range(sources)]


def _model(dim: int) -> "nn.Module":
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))


def _train(sizes: list[int], options: argparse.Namespace, model: "nn.Module", source: int, round_: int) -> float:
    """One pass over a source by plain gradient descent; its weight is its number of batches."""
    import torch

    generator = torch.Generator().manual_seed(source)
    for _ in range(sizes[source]):
        inputs, targets = torch.randn(2, options.batch, options.dim, generator=generator)
        gradients = torch.autograd.grad(((model(inputs) - targets) ** 2).mean(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.01)
    return float(sizes[source])


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB


def _print(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from titan_ext.launcher.text import columns

    print(f"{options.sites} virtual sites, {options.rounds} rounds, a model of {2 * options.dim * (options.dim + 1):,}")
    titles = ["sources", "batches", "placement", "s/round", "idle", "memory"]
    body = [
        [
            f"{row['sources']:,}",
            f"{row['batches_a_round']:,}",
            row["placement"],
            f"{row['seconds_a_round']:.3f}",
            f"{row['idle']:.1%}",
            f"+{row['beyond_start_mib']:.1f} MiB",
        ]
        for row in rows
    ]
    print(*columns([titles, *body]), sep="\n")
