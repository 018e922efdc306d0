"""``titan-ext plan FILE.toml``: what a run will take over given links, and which settings to take."""

import argparse
import json
import threading
from dataclasses import asdict, is_dataclass
from typing import Any

from titan_ext.commands.command import Command
from titan_ext.errors import UserError

_DESCRIPTION = """\
Predict what the run of a file will take over the links between its sites: memory, bytes, time of a sync, stall,
utilisation, days and money, each as an interval; advise on the outer loop's settings; say which links a utilisation
needs. Settings can be overridden as in training: --semi_sync.sync_every=16 …
"""

_EPILOG = """\
examples:
  titan-ext plan run.toml --link east-west=1gbit,80ms --step 350ms
  titan-ext plan run.toml --link 200mbit,40ms,0.1% --flops 300tflops --mtbf 24h --price prices.toml
  titan-ext plan run.toml --link 1gbit,80ms --target-utilisation 0.95       which links that needs
  titan-ext plan run.toml --link 1gbit,80ms --from runs/demo                calibrated by a run, and compared with it
  titan-ext plan run.toml --probe east --probe-link east-west=host:29600    measured here, at site east; before, at west:
  titan-ext plan --answer 29600

prices.toml:
  currency = "EUR"
  [default]            # of every site; [sites.NAME] for one
  gpu_hour = 2.5       # a rank for an hour
  egress_gb = 0.05     # 10**9 bytes that leave the site
  site_hour = 0.0      # all else
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The links, and what is known of the sites."""
    parser.add_argument("file", metavar="FILE.toml", nargs="?")
    parser.add_argument(
        "--link",
        action="append",
        default=[],
        metavar="[A-B=]RATE,RTT[,LOSS]",
        help="link between two sites, or of all pairs that are not named: 1gbit,80ms,0.1%%",
    )
    parser.add_argument(
        "--step", action="append", default=[], metavar="[SITE=]TIME", help="an inner step's time, such as 350ms"
    )
    parser.add_argument("--flops", metavar="RATE", help="operations a second of a rank, such as 400tflops")
    parser.add_argument(
        "--mtbf", action="append", default=[], metavar="[SITE=]TIME", help="mean time between faults of a site: 24h"
    )
    parser.add_argument("--recovery", default="5min", help="from a fault until the site trains again (default: 5min)")
    parser.add_argument("--price", metavar="PRICES.toml", help="prices by site")
    parser.add_argument(
        "--tokens", type=int, help="the budget of tokens of all sites (default: that of the file's steps)"
    )
    parser.add_argument(
        "--target-utilisation", type=float, metavar="SHARE", help="also say which links this utilisation needs"
    )
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        metavar="SITE",
        help="train some steps of this site here, and measure them",
    )
    parser.add_argument(
        "--probe-link",
        action="append",
        default=[],
        metavar="A-B=HOST:PORT",
        help="measure the link between two sites: from here to where --answer runs",
    )
    parser.add_argument(
        "--answer", type=int, metavar="PORT", help="answer --probe-link of another site; no file needed"
    )
    parser.add_argument("--from", dest="run_folder", metavar="RUN_FOLDER", help="learn from this run's metrics.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; mistakes raise ``UserError``.
    """
    if args.answer is not None:
        return _answer(args.answer)
    if args.file is None:
        raise UserError("plan: no FILE.toml given")
    from titan_ext.config.load import load_run
    from titan_ext.planner.build import Request, make_plan
    from titan_ext.planner.probe import probe_links, probe_steps
    from titan_ext.planner.report import render

    overrides = list(getattr(args, "overrides", []) or [])
    sites = load_run(args.file, overrides, needs=()).sites
    names = [site.name for site in sites]
    request = Request(
        file=args.file,
        links=args.link,
        steps=args.step,
        flops=args.flops,
        probed_steps=probe_steps(args.file, args.probe, names, overrides),
        probed_links=probe_links(args.probe_link, names),
        run=args.run_folder,
        mtbf=args.mtbf,
        recovery=args.recovery,
        prices=args.price,
        tokens=args.tokens,
        target=args.target_utilisation,
    )
    plan = make_plan(sites, request)
    print(json.dumps(_plain(plan), indent=2, ensure_ascii=False) if args.json else render(plan))
    return 0


def _answer(port: int) -> int:
    """Answer probes until Ctrl-C."""
    from titan_ext.links.probe import answering

    with answering(port) as own:
        print(f"answers --probe-link A-B=HOST:{own} of another site; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    return 0


def _plain(plan: Any) -> dict[str, Any]:
    """The plan for JSON; what other methods and codecs send by ``method/codec``."""
    works = {
        f"{method}/{codec}": sum(each.times * each.site_bytes for each in work.launches) / work.steps
        for (method, codec), work in plan.works.items()
    }
    links = plan.around.wiring.links
    return {
        "file": plan.file,
        "links": {
            f"{one}-{other}": asdict(links.between(place, place + 1 + more))
            for place, one in enumerate(links.sites)
            for more, other in enumerate(links.sites[place + 1 :])
        },
        "step_seconds": _dict(plan.around.step_seconds),
        "memory": _dict(plan.costs),
        "prediction": _dict(plan.prediction),
        "bytes_per_step": works,
        "advice": _dict(plan.advice),
        "needed": _dict(plan.needed),
        "compared": [{**asdict(each), "within": each.within, "ratio": each.ratio} for each in plan.comparisons],
        "assumptions": list(plan.assumptions),
    }


def _dict(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return {key: _dict(each) for key, each in value.items()} if isinstance(value, dict) else value


COMMAND = Command(
    name="plan",
    help="predict what a run takes over given links, and advise on its settings",
    description=_DESCRIPTION,
    epilog=_EPILOG,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
