"""torchft's newest nightly build in place of the release: its suites with the drop-in, and our tests of what we use of it.

The build (``torchft-nightly``) is taken from the package registry into a folder that is gone afterwards; nothing installed
changes. It may fail: that something differs is a figure and no error, so that the lane can run every week and tell early
what the next release will change. ``.ci/weekly`` runs it.

  conformance  ``titan-ext bench conformance`` of the parts with torchft's suites
  tests        of this repository, of membership, state transfer and the drop-in, which use torchft's private parts, until
               one fails; skipped where the package is installed without its repository
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from titan_ext.errors import RunError

HELP = "torchft's nightly build from the registry: what differs from the release (fetches it)"

_FETCHED = ("torchft-nightly", "parameterized")
"""The build, and what its own suites import besides."""

_PARTS = "torchft,torchft_traces"
_TESTS = ("tests/replica", "tests/semi_sync/compat")
_ROOT = Path(__file__).parents[2]
_VERSION = "from importlib.metadata import version; print(version('torchft-nightly'))"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beyond those of every benchmark."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fetch the build, run what is to be run with it, print a line each, and return the outcomes.

    Raises:
        RunError: the build cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as folder:
        _fetch(folder)
        # Before what is installed, in which torchft is the release.
        paths = [folder, str(_ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        nightly = _last_line([sys.executable, "-c", _VERSION], environment)[1]
        rows = [_outcome(*each, environment) for each in _commands().items()]
    for row in rows:
        print(f"{row['check']:<14}{'passes' if row['passes'] else 'FAILS':<8}{row['detail']}")
    return {"nightly": nightly, "release": version("torchft"), "rows": rows}


def _commands() -> dict[str, list[str]]:
    commands = {"conformance": ["-m", "titan_ext", "bench", "conformance", "--parts", _PARTS]}
    if (_ROOT / "tests").is_dir():
        # Where sites do not come to terms, each test takes all of its patience: the first one says enough.
        commands["tests"] = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--exitfirst", *_TESTS]
    return {name: [sys.executable, *arguments] for name, arguments in commands.items()}


def _fetch(folder: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *_FETCHED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["no reason given"]
        raise RunError(f"{_FETCHED[0]}: cannot be fetched: {reason[-1]}")


def _outcome(name: str, command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    passes, detail = _last_line(command, environment)
    return {"check": name, "passes": passes, "detail": detail}


def _last_line(command: list[str], environment: Mapping[str, str]) -> tuple[bool, str]:
    """Whether a command succeeds, and the last line for people that it writes."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT, env=dict(environment))
    said = done.stdout.strip() or done.stderr.strip()
    lines = [line for line in said.splitlines() if not line.startswith("{")]
    return done.returncode == 0, lines[-1] if lines else ""
