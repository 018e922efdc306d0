"""Figures of benchmarks and reproductions that are kept with the sources, each with the command that made it.

A record is a small JSON file: ``command``, ``version``, ``commit``, ``machine`` (cores and device, nothing else of it) and
the ``figures`` that the command printed on its last line.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_ext import __version__
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.files import write_whole

RESULTS = Path(__file__).parent / "results"
"""Where the records of this version of the sources are."""

# Flags that change nothing in the figures: where files go, and how many processes train.
_OF_THE_RUN = ("--out", "--plot", "--workers", "--record")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What one command came to."""

    command: str
    version: str
    commit: str
    """Of the sources, with ``+`` if they had been changed since; empty where they are no git repository."""
    machine: dict[str, Any]
    """``cores`` that could be used, and the ``device``."""
    figures: dict[str, Any]


def keep(name: str, arguments: Sequence[str], figures: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write the record ``NAME.json``, in place of an older one; returns the file.

    Args:
        name: of the benchmark.
        arguments: that ``titan-ext`` was called with.
        figures: JSON values.
        folder: made if it is not there.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    record = Record(
        command=shlex.join(["titan-ext", *_repeatable(arguments)]),
        version=__version__,
        commit=_commit(),
        machine={"cores": len(os.sched_getaffinity(0)), "device": _device(figures.get("device", "cpu"))},
        figures=dict(figures),
    )
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"{_compact(asdict(record))}\n")
    except OSError as error:
        raise unwritable(f"--record {folder}", error) from error
    return path


def read(folder: Path = RESULTS) -> dict[str, Record]:
    """The records of a folder by name, sorted.

    Raises:
        UserError: a file is no record.
    """
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def _read(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a record ({error}); remove it and run its command with --record") from error


def _repeatable(arguments: Sequence[str]) -> list[str]:
    """The arguments without flags that only say where files go and how many processes train."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in _OF_THE_RUN:
            skip = not value
        elif skip and not argument.startswith("--"):
            skip = False
        else:
            kept.append(argument)
            skip = False
    return kept


def _compact(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of the outer tables and lists, so that a change of a record can be read."""
    figures = content["figures"]
    lines = [f" {json.dumps(key)}: {_lines(value)}" for key, value in figures.items()]
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "figures"]
    return "{\n" + ",\n".join(head) + ',\n "figures": {\n' + ",\n".join(lines) + "\n }\n}"


def _lines(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]"
    return json.dumps(value)


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _device(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device
