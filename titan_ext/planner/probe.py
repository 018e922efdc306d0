"""What a plan measures itself: some inner steps of a site, and links."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from titan_ext.errors import RunError, UserError, one_of
from titan_ext.links.link import Link, parse_pair
from titan_ext.links.probe import measure
from titan_ext.planner.ledger import measured_step
from titan_ext.planner.range import Range

_STEPS = 15
_PATIENCE_SECONDS = 1800.0


def probe_steps(file: str, probed: Sequence[str], sites: Sequence[str], overrides: Sequence[str]) -> dict[str, Range]:
    """Seconds of an inner step of sites that train some steps on this machine, without the others.

    Args:
        file: the run's.
        probed: which of ``sites``.
        sites: names of all.
        overrides: of settings, as in training.

    Raises:
        UserError: a name is none of the sites'.
        RunError: training failed.
    """
    for name in probed:
        if name not in sites:
            raise UserError(f"--probe {name}: {one_of(name, sites)}")
    return {name: _step(file, name, overrides) for name in probed}


def probe_links(texts: Sequence[str], sites: Sequence[str]) -> dict[frozenset[str], Link]:
    """The links of ``--probe-link A-B=HOST:PORT`` flags.

    Raises:
        UserError: a flag cannot be read or names no two of ``sites``.
        RunError: nobody answers.
    """
    found: dict[frozenset[str], Link] = {}
    for text in texts:
        names, equals, address = text.partition("=")
        if not equals:
            raise UserError(f"--probe-link {text}: must be A-B=HOST:PORT, where `titan-ext plan --answer PORT` runs")
        pair = parse_pair(names, sites)  # before anything is measured
        found[pair] = measure(address)
    return found


def _step(file: str, name: str, overrides: Sequence[str]) -> Range:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "training.steps": _STEPS,
            "semi_sync.method": "none",
            "metrics.log_freq": 1,
            "checkpoint.enable": "false",
            "dump_folder": folder,
        }
        command = [sys.executable, "-m", "titan_ext", "launch", file, "--only", name, *overrides]
        command += [f"--{key}={value}" for key, value in settings.items()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise RunError(f"--probe {name}: {_STEPS} steps were not over after {_PATIENCE_SECONDS:g} s") from None
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise RunError(f"--probe {name}: training some steps failed: {lines[-1]}")
        return measured_step(Path(folder, name, "metrics.jsonl"))
