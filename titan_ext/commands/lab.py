"""``titan-ext lab FILE.toml``: rehearse a run's links, faults and outer loop on this machine."""

import argparse
import json

from titan_ext.commands.command import Command
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError

_DESCRIPTION = """\
Rehearse a run on one machine, without root: real outer loops of all sites exchange over links of a given rate, round-trip
time and loss, while sites are killed, cut off and slowed down. In virtual time a day of a run takes minutes, and the same
seed gives the same run. A stand-in with the names of the model's parameters trains in the model's place, and every byte
counts as many as it stands for. Settings can be overridden as in training: --training.steps 500 …
"""

_EPILOG = """\
examples:
  titan-ext lab run.toml --virtual-time --sites 8 --link 200mbit,40ms,0.1% --step 350ms
  titan-ext lab run.toml --virtual-time --link east-west=1gbit,80ms --fault kill:west@120s+10min --fault slow:east@1h+5min*3
  titan-ext lab run.toml --virtual-time --link 1gbit,80ms --mtbf 6h --until 24h --seed 1 --out runs/rehearsal

faults:
  kill:SITE@120s[+30s]        gone at 120 s, started again 30 s later (--restart)
  partition:A-B@100s+60s      nothing passes between two sites
  slow:SITE@100s+5min*3       steps take three times as long
  --faults FILE.jsonl         a recorded log: {"time": 120, "kind": "kill", "site": "west", "seconds": 30}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The links, the faults, and what is known of the sites."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--virtual-time", action="store_true", help="simulate the time that passes")
    parser.add_argument("--sites", type=int, help="so many copies of the file's first site (default: the file's sites)")
    parser.add_argument("--link", action="append", default=[], metavar="[A-B=]RATE,RTT[,LOSS]", help="as in plan")
    parser.add_argument(
        "--step", action="append", default=[], metavar="[SITE=]TIME", help="an inner step's time: 350ms"
    )
    parser.add_argument("--flops", metavar="RATE", help="operations a second of a rank, such as 400tflops")
    parser.add_argument("--fault", action="append", default=[], metavar="KIND:SITE@TIME", help="a fault; see below")
    parser.add_argument("--faults", metavar="FILE.jsonl", help="faults that were recorded")
    parser.add_argument("--mtbf", metavar="TIME", help="kill every site at random, so far apart on average")
    parser.add_argument("--restart", default="30s", help="from a kill to the next start (default: 30s)")
    parser.add_argument("--until", metavar="TIME", help="end after so much time: 24h (default: the file's steps)")
    parser.add_argument(
        "--jitter", type=float, default=0.02, help="deviation of a step's time, a share (default: 0.02)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random faults, jitter and noise (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="write the sites' metrics.jsonl there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0 if the run came to its end or to ``--until``, 1 if all sites ended early; mistakes raise ``UserError``.
    """
    if not args.virtual_time:
        raise UserError("lab: there are no rehearsals in real time; add --virtual-time")
    from titan_ext.config.load import load_run
    from titan_ext.lab.build import Request, make_script
    from titan_ext.lab.rehearsal import Rehearsal
    from titan_ext.lab.report import plain, render, write_journals

    sites = load_run(args.file, list(getattr(args, "overrides", []) or []), needs=()).sites
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
    )
    script = make_script(sites, request)
    outcome = Rehearsal(script).run()
    try:
        if args.out is not None:
            write_journals(args.out, outcome)
    except OSError as error:
        raise unwritable(f"--out {error.filename}", error) from None
    print(json.dumps(plain(args.file, outcome), indent=2) if args.json else render(args.file, outcome, script.faults))
    return 0 if outcome.finished or args.until is not None else 1


COMMAND = Command(
    name="lab",
    help="rehearse a run's links, faults and outer loop on this machine",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
