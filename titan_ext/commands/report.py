"""``titan-ext report RUN… --out report.html``: runs frozen into one page."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from titan_ext.commands.command import Command
from titan_ext.commands.watch import open_reader
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.files import write_whole

_DESCRIPTION = """\
Write one self-contained HTML file with everything that `titan-ext watch --web` shows of a run, as it is now:
losses, bytes, utilisation, who took part and why not, the ledger, and the configuration. Of several runs also
their totals, the settings in which they differ, and their losses side by side; runs that differ by
debug.seed alone are one curve with the spread of its seeds. A RUN is what `titan-ext watch` takes.
"""

_POINTS, _ROUNDS = 1500, 3000
_OF_A_SITE = ("site", "data", "resolved", "dump_folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where to write."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a FILE.toml, a run's folder, or http://host:port")
    parser.add_argument("--out", default="report.html", metavar="FILE.html", help="default %(default)s")
    parser.add_argument("--alerts", metavar="FILE.toml", help="alerts of your own")
    parser.add_argument("--secret-file", metavar="FILE", help="the run's replica.secret_file, for sites behind a URL")


def run(args: argparse.Namespace) -> int:
    """Write the report; returns 0, 1 where a site of a run cannot be read, which is told.

    Raises:
        UserError: a run is none, or the file cannot be written.
    """
    from titan_ext.instruments.alerts import load_rules
    from titan_ext.instruments.report import report
    from titan_ext.instruments.snapshot import snapshot

    rules = load_rules(args.alerts)
    shots: list[dict[str, Any]] = []
    configs: dict[str, dict[str, Any]] = {}
    unread: list[str] = []
    for target, name in zip(args.runs, _names(args.runs), strict=True):
        reader = open_reader([target], args.secret_file)
        reader.refresh()
        if reader.problems:
            raise UserError(reader.problems[0])

        def take(run: Any, name: str = name) -> None:
            run.name = name
            unread.extend(f"{name}: {site.name}: {site.problem}" for site in run.sites.values() if site.problem)
            shots.append(snapshot(run, rules, time.time(), points=_POINTS, rounds=_ROUNDS))
            config = next((site.config for site in run.sites.values() if site.config is not None), None)
            if config is not None:
                # Not what the sites of a run differ in, nor where it lies.
                configs[name] = {key: each for key, each in config.items() if key not in _OF_A_SITE}

        reader.view(take)
    _write(Path(args.out).expanduser(), report(shots, configs))
    print(f"{args.out}: {len(shots)} run{'' if len(shots) == 1 else 's'}")
    for each in unread:
        print(f"titan-ext: error: what the page has of a site is not all: {each}", file=sys.stderr)
    return int(bool(unread))


def _names(targets: list[str]) -> list[str]:
    """A name for each run: the shortest end of its path that no other one has."""
    whole = [target if "://" in target else str(Path(target).resolve()) for target in targets]
    for target in whole:
        if whole.count(target) > 1:
            raise UserError(f"{target}: is given twice")
    parts = [each.split("/") for each in whole]
    longest = max(map(len, parts))
    ends = next(
        ends
        for size in range(1, longest + 1)
        if len(set(ends := ["/".join(each[-size:]) for each in parts])) == len(parts)
    )
    return ends


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise unwritable(f"--out {path}", error) from error


COMMAND = Command(
    name="report",
    help="runs in one self-contained HTML file: losses, bytes, who took part, and how runs differ",
    description=_DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
)
