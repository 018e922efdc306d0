"""``titan-ext bench``: measurements of the product, and reproductions of papers."""

import argparse
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

from titan_ext.bench import (
    boxes,
    bytes,
    goodput,
    lab,
    metrics,
    nightly,
    optim,
    overhead,
    plan,
    rejoin,
    sources,
    stall,
    sync,
    wan,
)
from titan_ext.bench.chaos import command as chaos
from titan_ext.bench.conformance import command as conformance
from titan_ext.commands.command import Command
from titan_ext.experiments import pages, records
from titan_ext.experiments.abbie import command as abbie
from titan_ext.experiments.adapt import command as adapt
from titan_ext.experiments.convergence import command as convergence
from titan_ext.experiments.dept import command as dept
from titan_ext.experiments.fomoe import command as fomoe
from titan_ext.experiments.mup import command as mup
from titan_ext.experiments.pafl import command as pafl
from titan_ext.experiments.participation import command as participation
from titan_ext.experiments.sparsity import command as sparsity
from titan_ext.experiments.tiny import command as tiny
from titan_ext.experiments.worldlm import command as worldlm

# Each with HELP, add_arguments(parser) and run(options) -> figures; its docstring describes it. One that is recorded under
# several names, by its options, has record_name(options).
_BENCHMARKS = {
    "abbie": abbie,
    "adapt": adapt,
    "boxes": boxes,
    "bytes": bytes,
    "chaos": chaos,
    "conformance": conformance,
    "convergence": convergence,
    "dept": dept,
    "fomoe": fomoe,
    "goodput": goodput,
    "lab": lab,
    "metrics": metrics,
    "mup": mup,
    "nightly": nightly,
    "optim": optim,
    "overhead": overhead,
    "pafl": pafl,
    "participation": participation,
    "plan": plan,
    "rejoin": rejoin,
    "results": pages,
    "sources": sources,
    "sparsity": sparsity,
    "stall": stall,
    "sync": sync,
    "tiny": tiny,
    "wan": wan,
    "worldlm": worldlm,
}


def _action(name: str, benchmark: ModuleType) -> Command:
    def run(options: argparse.Namespace) -> int:
        """Print the figures as the last line."""
        # As an exception, on which its workers are ended; Python would just be gone.
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        try:
            figures = benchmark.run(options)
        finally:
            signal.signal(signal.SIGTERM, before)
        if options.record is not None:
            record = benchmark.record_name(options) if hasattr(benchmark, "record_name") else name
            print("recorded:", records.keep(record, options.arguments, figures, options.record))
        print(json.dumps({"benchmark": name, **figures}), flush=True)
        return 0

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        benchmark.add_arguments(parser)
        parser.add_argument(
            "--record",
            type=Path,
            nargs="?",
            const=records.RESULTS,
            metavar="FOLDER",
            help=f"keep the figures with this command as FOLDER/{name}.json (default: titan_ext/experiments/results)",
        )

    return Command(
        name=name,
        help=benchmark.HELP,
        description=benchmark.__doc__ or "",
        add_arguments=add_arguments,
        run=run,
    )


COMMAND = Command(
    name="bench",
    help="measure speed, bytes and behaviour; reproduce papers; results of both",
    actions=tuple(_action(*each) for each in _BENCHMARKS.items()),
)
