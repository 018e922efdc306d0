"""``titan-ext selftest``: whether this machine's device computes what the CPU does, in one table."""

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from titan_ext import __version__
from titan_ext.commands.command import Command
from titan_ext.errors import UserError

if TYPE_CHECKING:
    from titan_ext.selftest.row import Row

_DESCRIPTION = """\
Try on this machine's device what runs depend on, and compare with the CPU's results: codecs, inner optimizers, the outer
loop's methods, its copies in host memory (pinned on CUDA), a run of two sites of real processes (the device's own
collectives inside a site, Gloo between), torch.compile, and what a round adds to a step and to memory.

It prints one table, for a bug report or to compare machines, and takes some minutes. Exit code 1: something failed.
Without torchtitan and torchft the run of two sites is skipped."""
_EXAMPLES = """\
examples:
  titan-ext selftest                              on the accelerator, or on the CPU where there is none
  titan-ext selftest --device cpu --parts codecs,optimizers
"""
_PARTS = ("codecs", "optimizers", "outer-loop", "off-load", "compile", "training", "ratios")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='"cpu", or the accelerator, such as "cuda" (default: the one there is)')
    parser.add_argument("--parts", help=f"comma-separated (default: all): {', '.join(_PARTS)}")


def _run(options: argparse.Namespace) -> int:
    """Print the table, line by line as it comes."""
    device, parts = _checked(options)
    print(f"titan_ext {__version__}, {_machine(device)}")
    failed, started = [], time.perf_counter()
    for part in parts:
        before = time.perf_counter()
        for row in _rows(part, device):
            failed += [row] if row.verdict == "FAILED" else []
            print(f"{row.verdict:<9} {row.part:<11} {row.name:<28} {row.figure}", flush=True)
        print(f"{'':<9} {part:<11} {time.perf_counter() - before:.0f} s", flush=True)
    print(f"{len(failed)} failed, {time.perf_counter() - started:.0f} s in all")
    return 1 if failed else 0


def _rows(part: str, device: str) -> "Iterator[Row]":
    from titan_ext.selftest import tensors, training
    from titan_ext.selftest.row import judged

    checks: dict[str, Callable[[str], Iterator[Row]]] = {
        "codecs": tensors.codecs,
        "optimizers": tensors.optimizers,
        "outer-loop": tensors.outer_loop,
        "off-load": tensors.off_load,
        "compile": training.compiled,
        "training": training.training,
        "ratios": training.ratios,
    }
    try:
        yield from checks[part](device)
    except Exception as error:  # noqa: BLE001 - told in the table; the other parts go on
        lines = str(error).splitlines() or [""]
        yield judged(part, "ended early", False, f"{type(error).__name__}: {lines[0]}")


def _checked(options: argparse.Namespace) -> tuple[str, Sequence[str]]:
    import torch

    there = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = options.device or there
    if device not in ("cpu", there):
        raise UserError(f"--device {device}: must be one of {', '.join(dict.fromkeys(('cpu', there)))} on this machine")
    parts = _PARTS if options.parts is None else tuple(options.parts.split(","))
    for part in parts:
        if part not in _PARTS:
            raise UserError(f"--parts {part}: must be some of {', '.join(_PARTS)}")
    return device, parts


def _machine(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"torch {torch.__version__}, Python {platform.python_version()}, {device}: {name}"


COMMAND = Command(
    name="selftest",
    help="whether this machine's device computes what the CPU does",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    add_arguments=_add_arguments,
    run=_run,
)
