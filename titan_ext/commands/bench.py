"""The ``titan-ext bench`` command."""

import argparse
import json
import signal
import sys
from importlib import import_module

# Name on the command line -> module with HELP, add_arguments(parser) and run(options) -> figures.
_BENCHMARKS = {
    "abbie": "titan_ext.experiments.abbie.command",
    "bytes": "titan_ext.bench.bytes",
    "chaos": "titan_ext.bench.chaos.command",
    "convergence": "titan_ext.experiments.convergence.command",
    "dept": "titan_ext.experiments.dept.command",
    "optim": "titan_ext.bench.optim",
    "overhead": "titan_ext.bench.overhead",
    "rejoin": "titan_ext.bench.rejoin",
    "sync": "titan_ext.bench.sync",
    "wan": "titan_ext.bench.wan",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``bench`` and its benchmarks."""
    parser = subparsers.add_parser("bench", help="measure speed; every figure is a ratio within one run")
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module in _BENCHMARKS.items():
        benchmark = import_module(module)
        child = names.add_parser(name, help=benchmark.HELP, description=benchmark.__doc__)
        benchmark.add_arguments(child)


def run(options: argparse.Namespace) -> int:
    """Run one benchmark and print its figures as the last line."""
    # As an exception, on which its workers are ended; Python would just be gone.
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        figures = import_module(_BENCHMARKS[options.benchmark]).run(options)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps({"benchmark": options.benchmark, **figures}), flush=True)
    return 0
