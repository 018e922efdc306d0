"""``titan-ext doctor FILE.toml``: what surrounds a run, looked at before it starts."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from titan_ext.commands.command import Command
from titan_ext.errors import RunError, UserError

if TYPE_CHECKING:
    from titan_ext.doctor.finding import Finding

_DESCRIPTION = """\
Look at what a run needs of its surroundings: ports, open files, disk, memory at a sync, the ladder of
timeouts, the advertised address and how long its name takes to be looked up, and who uses the lighthouse.
Each finding says what it is, why it will hurt, and the line that mends it.

With --site and a lighthouse also what lies between the sites. Before a run: start it at all sites at the
same time; each dials the others, and they dial back: speed, round-trip time, MTU, clocks, and whether
versions and plans are equal. While a run goes on: the members' ports are dialled, and the run is not disturbed.

Exit codes: 0 no problem, 1 a problem, 2 bad input.
"""

_SIGNS = {"ok": "  ok ", "note": "note ", "warning": "warn ", "problem": "FAIL "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which site, and in what form."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--site", metavar="NAME", help="look at this site only, and at its ways to the others")
    parser.add_argument("--lighthouse", metavar="URL", help="instead of replica.lighthouse")
    parser.add_argument(
        "--wait-seconds", type=float, default=60.0, metavar="S", help="for the others' doctors (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings.

    Returns:
        1 where there is a problem.

    Raises:
        UserError: the file cannot be trained.
    """
    if not args.wait_seconds >= 0:
        raise UserError(f"--wait-seconds {args.wait_seconds:g}: must be at least 0 seconds")
    from titan_ext.config.load import load_run, load_site
    from titan_ext.doctor.examine import examine_lighthouse, examine_links, examine_site

    overrides = [*args.overrides, *(["--replica.lighthouse", args.lighthouse] if args.lighthouse else [])]
    if args.site is None:
        sites = load_run(args.file, overrides, needs=()).sites
    else:
        sites = [load_site(args.file, args.site, overrides, needs=())]
    found: dict[str, list[Finding]] = {}
    lighthouses: dict[str | None, list[Finding]] = {}
    for site in sites:
        if args.site is not None:
            found[site.name] = examine_site(site, examine_links(site, args.file, args.wait_seconds))
            continue
        named = site.config.replica.lighthouse
        if named not in lighthouses:  # one that does not answer is waited for once
            lighthouses[named] = examine_lighthouse(site, args.file)
        found[site.name] = [*examine_site(site, None), *lighthouses[named]]
    print(_as_json(args.file, found) if args.json else _as_text(args.file, found))
    return int(any(each.level == "problem" for findings in found.values() for each in findings))


def _as_text(file: str, found: "dict[str, list[Finding]]") -> str:
    lines = []
    for name, findings in found.items():
        lines += [f"{file}, site {name}", *(line for each in findings for line in _lines(each)), ""]
    counts = [
        sum(each.level == level for findings in found.values() for each in findings) for level in ("problem", "warning")
    ]
    return "\n".join([*lines, f"{counts[0]} problem(s), {counts[1]} warning(s)"])


def _lines(finding: "Finding") -> list[str]:
    lines = [f"  {_SIGNS[finding.level]} {finding.check}: {finding.what}"]
    if finding.why:
        lines.append(f"          why:  {finding.why}")
    if finding.mend:
        lines.append(f"          mend: {finding.mend}")
    return lines


def _as_json(file: str, found: "dict[str, list[Finding]]") -> str:
    sites: list[dict[str, Any]] = [
        {"name": name, "findings": [asdict(each) for each in findings]} for name, findings in found.items()
    ]
    return json.dumps({"file": file, "sites": sites}, indent=2, ensure_ascii=False)


def brief_lines(sites: Sequence[Any]) -> list[str]:
    """What the launcher tells before it starts sites of this machine: only what will hurt, from what costs nothing to see."""
    from titan_ext.doctor.examine import brief
    from titan_ext.doctor.finding import SERIOUS

    try:
        found = {site.name: [each for each in brief(site) if each.level in SERIOUS] for site in sites}
    except (OSError, RunError) as error:
        return [f"doctor: could not look: {error}"]
    return [
        f"doctor: {name}: {each.check}: {each.what}; {each.why}; mend: {each.mend}"
        for name, findings in found.items()
        for each in findings
    ]


COMMAND = Command(
    name="doctor",
    help="what a run needs of this machine, the timeouts, the lighthouse and the ways between sites",
    description=_DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
