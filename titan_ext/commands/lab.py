"""``titan-ext lab FILE.toml``: rehearse a run's links, faults and outer loop on this machine."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from titan_ext.commands.command import Command
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.launcher.supervisor import INTERRUPTED

if TYPE_CHECKING:
    from titan_ext.lab.build import Request
    from titan_ext.lab.faults import Fault
    from titan_ext.lab.trace import Outcome

_DESCRIPTION = """\
Rehearse a run on one machine, without root: its sites exchange over links of a given rate, round-trip time and loss, while
sites are killed, cut off and slowed down.

In real time the run's own processes train its model on its data, started by the launcher; a relay carries what they tell each
other. In virtual time (--virtual-time) a stand-in with the names of the model's parameters trains in the model's place, and
every byte counts as many as it stands for: a day of a run takes minutes, and the same seed gives the same run.

Settings can be overridden as in training: --training.steps 500 …
"""

_EPILOG = """\
examples:
  titan-ext lab run.toml --link 200mbit,40ms,0.1% --fault kill:west@60s --seed 1
  titan-ext lab run.toml --link east-west=1gbit,80ms --mtbf 10min --until 1h --out runs/rehearsal
  titan-ext lab run.toml --virtual-time --sites 8 --link 200mbit,40ms,0.1% --step 350ms --mtbf 6h --until 24h

faults:
  kill:SITE@120s[+30s]        gone at 120 s, started again 30 s later (--restart)
  partition:A-B@100s+60s      nothing passes between two sites
  slow:SITE@100s+5min*3       steps take three times as long
  --faults FILE.jsonl         a recorded log: {"time": 120, "kind": "kill", "site": "west", "seconds": 30}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The links, the faults, and what is known of the sites."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--virtual-time", action="store_true", help="simulate the time that passes, and the model")
    parser.add_argument(
        "--namespaces", action="store_true", help="in real time, as root: each site in a network namespace of its own"
    )
    parser.add_argument("--sites", type=int, help="so many copies of the file's first site (default: the file's sites)")
    parser.add_argument("--link", action="append", default=[], metavar="[A-B=]RATE,RTT[,LOSS]", help="as in plan")
    parser.add_argument(
        "--step",
        action="append",
        default=[],
        metavar="[SITE=]TIME",
        help="with --virtual-time: an inner step's time: 350ms",
    )
    parser.add_argument("--flops", metavar="RATE", help="with --virtual-time: of a rank, such as 400tflops")
    parser.add_argument("--fault", action="append", default=[], metavar="KIND:SITE@TIME", help="a fault; see below")
    parser.add_argument("--faults", metavar="FILE.jsonl", help="faults that were recorded")
    parser.add_argument("--mtbf", metavar="TIME", help="kill every site at random, so far apart on average")
    parser.add_argument("--restart", default="30s", help="from a kill to the next start (default: 30s)")
    parser.add_argument("--until", metavar="TIME", help="end after so much time: 24h (default: the file's steps)")
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.02,
        help="with --virtual-time: deviation of a step's time, a share (default: 0.02)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random faults, jitter and noise (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="keep what the sites write there; it must hold no run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 if the run came to its end or to ``--until``, 1 if sites ended early for good, 130 if the user stopped it; mistakes
        raise ``UserError``.
    """
    from titan_ext.config.load import load_run
    from titan_ext.lab.build import Request
    from titan_ext.lab.report import plain, render

    if args.namespaces and args.virtual_time:
        raise UserError("--namespaces: is of real time; leave it or --virtual-time out")
    overrides = list(getattr(args, "overrides", []) or [])
    sites = load_run(args.file, overrides, needs=()).sites
    request = Request(
        sites=args.sites,
        links=args.link,
        steps=args.step,
        flops=args.flops,
        faults=args.fault,
        fault_log=args.faults,
        mtbf=args.mtbf,
        restart=args.restart,
        until=args.until,
        seed=args.seed,
        jitter=args.jitter,
        out=args.out,
    )
    if args.virtual_time:
        code, outcome, faults = _in_virtual_time(sites, request)
    else:
        code, outcome, faults = _in_real_time(args, overrides, sites, request)
    if code == INTERRUPTED:
        return code
    print(json.dumps(plain(args.file, outcome), indent=2) if args.json else render(args.file, outcome, faults))
    return code


def _in_virtual_time(sites: Sequence[Any], request: "Request") -> tuple[int, "Outcome", Sequence["Fault"]]:
    from titan_ext.lab.build import make_script
    from titan_ext.lab.rehearsal import Rehearsal
    from titan_ext.lab.report import make_folders, write_journals

    script = make_script(sites, request)
    try:
        if request.out is not None:
            make_folders(request.out, [site.name for site in script.sites])
        outcome = Rehearsal(script).run()
        if request.out is not None:
            write_journals(request.out, outcome)
    except OSError as error:
        raise unwritable(f"--out {error.filename}", error) from None
    return 0 if outcome.finished or request.until is not None else 1, outcome, script.faults


def _in_real_time(
    args: argparse.Namespace, overrides: Sequence[str], sites: Sequence[Any], request: "Request"
) -> tuple[int, "Outcome", Sequence["Fault"]]:
    from titan_ext.lab.build import make_real_script
    from titan_ext.lab.real_time.namespaced import NamespacedSites
    from titan_ext.lab.real_time.relayed import RelayedSites
    from titan_ext.lab.real_time.run import rehearse

    script, links = make_real_script(args.file, overrides, sites, request)
    # What the sites write is for people; the object of --json stands alone.
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        surroundings = NamespacedSites(links) if args.namespaces else RelayedSites(links, args.seed)
        print(f"{len(links.sites)} sites on this machine, {links.describe()}")
        return *rehearse(script, surroundings), script.faults


COMMAND = Command(
    name="lab",
    help="rehearse a run's links, faults and outer loop on this machine",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
