"""Trains a small model at several sites while sites, links and the lighthouse fail, and checks what must hold.

Each site is a real process that trains on real text, under the launcher's own supervisor; the lighthouse is one
of its own. Between them lies what lies between the sites of ``titan-ext lab``: network namespaces as root, otherwise
its relay. Faults are drawn from a seed: SIGKILL and SIGSTOP of a site's ranks, SIGTERM of a whole site, SIGKILL
of the lighthouse, and cuts of a site's link. Near the end
no more faults happen, so that all sites can come back. Then the same is trained undisturbed, for as many
tokens as were contributed, and compared.

Live is a site from the first inner step that it finishes after a fault of its own, to the next such fault.
A check that fails makes the exit code 1; then the logs stay.
"""

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag
from titan_ext.errors import RunError

if TYPE_CHECKING:
    from titan_ext.bench.chaos.checks import Check
    from titan_ext.bench.chaos.faults import Fault
    from titan_ext.bench.chaos.run_config import RunConfig
    from titan_ext.bench.chaos.runner import Outcome
    from titan_ext.lab.real_time.run import Surroundings

HELP = "a run under random faults, and whether all that must hold does"

_SIZES: Numbers = {
    # default, least, help
    "seed": (0, 0, "of the faults and of the sites' data"),
    "rounds": (200, 15, "committed rounds of the run"),
    "sites": (4, 3, "number of sites"),
    "keep_live": (0, 0, "a fault waits while it would leave fewer contributing sites than that"),
    "sync_every": (20, 1, "inner steps between rounds"),
    "seq_len": (64, 8, "tokens a sequence"),
    "batch": (4, 1, "sequences of a site and step"),
}
_LINK_BITS = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the run, and how often faults happen."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_numbers(parser, _SIZES)
    parser.add_argument("--faults-per-hour", type=float, default=100.0, help="on average (default: 100)")
    parser.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, default=True, help="with an undisturbed run (default: yes)"
    )
    parser.add_argument("--minutes", type=float, default=40.0, help="limit of each of the two runs (default: 40)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run under faults and without, print a line a check, and return the figures.

    Raises:
        UserError: an option is out of range.
        RunError: a check failed; the figures are printed before.
    """
    _check(options)
    from titan_ext.bench.chaos.run_config import RunConfig

    config = RunConfig(**{key: getattr(options, key) for key in ("sites", "seq_len", "batch", "sync_every", "seed")})
    folder = Path(tempfile.mkdtemp(prefix="titan-ext-chaos-"))
    with closing(_surroundings(config)) as around:
        disturbed = _disturbed(options, config, folder / "disturbed", around)
        calm = _undisturbed(options, config, folder / "undisturbed", around, disturbed) if options.compare else None
    checks = _judge(disturbed, calm, config)
    figures = {
        "faults": Counter(fault.kind for fault in disturbed.injected),
        "faults_per_hour": round(3600 * len(disturbed.injected) / disturbed.seconds, 1),
        "seconds": round(disturbed.seconds, 1),
        "checks": {check.name: {"passed": check.passed, "figure": check.figure} for check in checks},
    }
    failed = [check.name for check in checks if not check.passed]
    if failed:
        _keep_samples(disturbed, folder / "samples.json")
        print(json.dumps({"benchmark": "chaos", **figures}), flush=True)
        raise RunError(f"{', '.join(failed)}: failed; the logs are in {folder}")
    shutil.rmtree(folder)
    return figures


def _keep_samples(outcome: "Outcome", path: Path) -> None:
    """What the processes held after each round, which no log has."""
    samples = {name: [asdict(sample) for sample in site.samples] for name, site in outcome.sites.items()}
    path.write_text(json.dumps(samples), encoding="utf-8")


def _surroundings(config: "RunConfig") -> "Surroundings":
    from titan_ext.lab.real_time.namespaced import NamespacedSites
    from titan_ext.lab.real_time.relayed import RelayedSites
    from titan_ext.links.link import Link, Links
    from titan_ext.links.namespaces import missing

    links = Links.alike(config.names, Link(_LINK_BITS))
    return NamespacedSites(links) if missing() is None else RelayedSites(links, config.seed)


def _disturbed(options: argparse.Namespace, config: "RunConfig", folder: Path, around: "Surroundings") -> "Outcome":
    from titan_ext.bench.chaos.faults import Kind, sample_faults

    rate, seconds = options.faults_per_hour, 60 * options.minutes
    faults = sample_faults(options.seed, sites=config.names, kinds=list(Kind), per_hour=rate, seconds=seconds)
    print(f"{options.sites} sites, {options.rounds} rounds; faults by seed {options.seed}, from the first commit on:")
    for fault in faults:
        print(f"  {fault.at:8.1f} s  {fault}")
    return _run(options, config, folder, around, options.rounds, faults)


def _undisturbed(
    options: argparse.Namespace, config: "RunConfig", folder: Path, around: "Surroundings", disturbed: "Outcome"
) -> "Outcome":
    from titan_ext.bench.chaos.checks import contributed_tokens

    rounds = max(1, round(contributed_tokens(disturbed) / (config.sites * config.round_tokens)))
    print(f"undisturbed: {rounds} rounds, as many tokens as were contributed")
    return _run(options, config, folder, around, rounds, [])


def _run(
    options: argparse.Namespace,
    config: "RunConfig",
    folder: Path,
    around: "Surroundings",
    rounds: int,
    faults: Sequence["Fault"],
) -> "Outcome":
    from titan_ext.bench.chaos.run_config import folders, jobs
    from titan_ext.bench.chaos.runner import ChaosRun

    return ChaosRun(
        folders(config, folder),
        jobs(config, folder, rounds, around),
        faults,
        cut_off=lambda site, seconds: around.cut_off(config.names.index(site), seconds),
        keep_live=options.keep_live,
        rounds=rounds,
        seconds=60 * options.minutes,
        say=lambda line: print(line, flush=True),
    ).run()


def _judge(disturbed: "Outcome", calm: "Outcome | None", config: "RunConfig") -> list["Check"]:
    from titan_ext.bench.chaos import checks

    found = [
        checks.finished(disturbed),
        checks.equal(disturbed),
        checks.in_company(disturbed),
        checks.participation(disturbed),
        *([checks.loss(disturbed, calm, config)] if calm is not None else []),
        checks.orphans(disturbed),
        checks.memory(disturbed, calm),
        checks.descriptors(disturbed, calm),
    ]
    print(f"\n{len(disturbed.injected)} faults, {3600 * len(disturbed.injected) / disturbed.seconds:.0f} an hour")
    for check in found:
        print(f"{'PASS' if check.passed else 'FAIL'}  {check.name:<18} {check.figure}")
    return found


def _check(options: argparse.Namespace) -> None:
    check_numbers(options, _SIZES)
    for key in ("faults_per_hour", "minutes"):
        require_flag(getattr(options, key) > 0, key, getattr(options, key), "above 0")
