"""The laboratory's relay against the kernel's own TCP: the same rounds behind gates and in network namespaces.

Needs Linux and root, for the namespaces; elsewhere it says what is missing and ends well. Two sites synchronise a synthetic
model by DiLoCo over each link, in turns: in namespaces, where a router holds packets back, and on the loopback interface with
the relay of ``titan-ext lab`` between them. It prints seconds of a round (median), their ratio, and bytes: of the ledger,
which must be equal, and of frames. The kernel's TCP is Reno, which every namespace may use and which does as CUBIC where
nothing is lost; BBR, the default of some machines, keeps its window over pauses.
"""

import argparse
import os
from contextlib import ExitStack, closing
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Any

from titan_ext.bench.flags import listed_numbers, require_flag
from titan_ext.errors import RunError

if TYPE_CHECKING:
    from titan_ext.bench.workers import WorkerGroup
    from titan_ext.links.link import Links

HELP = "rounds through the laboratory's relay against network namespaces (root, Linux)"
_NAMES = ["site0", "site1"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The links, and size and length of the measurement."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rates", default="50,200", help="Mbit/s, comma-separated (default: 50,200)")
    parser.add_argument("--rtts", default="0,40,100", help="milliseconds there and back (default: 0,40,100)")
    parser.add_argument("--parameters", type=float, default=2.5e6, help="size of the model (default: 2.5e6)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds over each link (default: 5)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return the figures; where it cannot be, only ``skipped`` with the reason.

    Raises:
        UserError: an option is out of range.
        RunError: a site failed, or sites disagree after a round.
    """
    from titan_ext.links.namespaces import missing

    rates, rtts = listed_numbers("rates", options.rates, 0.1), listed_numbers("rtts", options.rtts, 0.0)
    require_flag(options.rounds >= 1, "rounds", options.rounds, "at least 1")
    require_flag(options.parameters >= 1e4, "parameters", options.parameters, "at least 1e4")
    if (reason := missing()) is not None:
        print(f"skipped: {reason}")
        return {"skipped": reason}
    print(f"{'link':<24}{'namespaces':>12}{'lab':>10}{'ratio':>8}{'MB':>9}{'MB lab':>9}{'frames':>9}")
    rows = [_measure(rate, rtt, options) for rate, rtt in product(rates, rtts)]
    worst = max((row["ratio"] for row in rows), key=lambda ratio: max(ratio, 1 / ratio))
    print(f"furthest from the namespaces: {worst:.3f} of their seconds")
    return {"rows": rows, "worst_ratio": worst}


def _measure(rate: float, rtt: float, options: argparse.Namespace) -> dict[str, Any]:
    """One link."""
    from titan_ext.links.link import Link, Links

    links = Links.alike(_NAMES, Link(rate * 1e6, rtt / 1000))
    rounds: dict[str, list[dict[str, float]]] = {"namespaces": [], "lab": []}
    with ExitStack() as stack:
        groups = {"namespaces": _in_namespaces(stack, links, options), "lab": _behind_gates(stack, links, options)}
        for turn in range(options.rounds + 1):
            for name, group in groups.items():
                results = group.call("round")
                if len({result.pop("checksum") for result in results}) != 1:
                    raise RunError(f"{name}: the sites' parameters differ after a round")
                if turn:  # the first one connects the sites
                    rounds[name].append({key: max(result[key] for result in results) for key in results[0]})
    figures = {name: {key: median(each[key] for each in found) for key in found[0]} for name, found in rounds.items()}
    kernel, lab = figures["namespaces"], figures["lab"]
    row = {
        "rate_mbit": rate,
        "rtt_ms": rtt,
        "namespaces_seconds": round(kernel["seconds"], 4),
        "lab_seconds": round(lab["seconds"], 4),
        "ratio": round(lab["seconds"] / kernel["seconds"], 4),
        "namespaces_bytes": kernel["bytes"],
        "lab_bytes": lab["bytes"],
        "frames_ratio": round(lab["frames"] / kernel["frames"], 4),
    }
    print(
        f"{f'{rate:g} Mbit/s, {rtt:g} ms':<24}{row['namespaces_seconds']:>12.3f}{row['lab_seconds']:>10.3f}{row['ratio']:>8.3f}"
        f"{kernel['bytes'] / 1e6:>9.2f}{lab['bytes'] / 1e6:>9.2f}{row['frames_ratio']:>9.3f}",
        flush=True,
    )
    return row


def _in_namespaces(stack: ExitStack, links: "Links", options: argparse.Namespace) -> "WorkerGroup":
    from titan_ext.bench.sync_sites import Lighthouse
    from titan_ext.bench.workers import WorkerGroup
    from titan_ext.links.namespaces import Wan, address_of

    link = links.between(0, 1)
    wan = stack.enter_context(Wan(len(_NAMES), link.rate / 1e6, rtt_ms=1000 * link.rtt, congestion_control="reno"))
    lighthouse = stack.enter_context(WorkerGroup(Lighthouse, [(len(_NAMES),)], [wan.hub]))
    url = f"http://{wan.hub_address}:{lighthouse.call('port')[0]}"
    return _start(stack, url, [address_of(site) for site in range(len(_NAMES))], wan.sites, 0, options)


def _behind_gates(stack: ExitStack, links: "Links", options: argparse.Namespace) -> "WorkerGroup":
    from titan_ext.bench.sync_sites import Lighthouse
    from titan_ext.bench.workers import WorkerGroup
    from titan_ext.lab.real_time.relayed import RelayedSites

    sites = stack.enter_context(closing(RelayedSites(links, seed=0)))
    lighthouse = stack.enter_context(WorkerGroup(Lighthouse, [(len(_NAMES),)]))
    url = f"http://{sites.lighthouse}:{lighthouse.call('port')[0]}"
    gates = [sites.gate(place) for place in range(len(_NAMES))]
    return _start(stack, url, sites.addresses, gates, sites.streams or 0, options)


def _start(
    stack: ExitStack, url: str, addresses: list[str], networks: list[Any], streams: int, options: argparse.Namespace
) -> "WorkerGroup":
    from titan_ext.bench.sync_sites import SyncSite
    from titan_ext.bench.workers import WorkerGroup

    count = len(addresses)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    arguments = [
        ("fp32", site, count, url, options.parameters, threads, address, streams)
        for site, address in enumerate(addresses)
    ]
    return stack.enter_context(WorkerGroup(SyncSite, arguments, networks))
