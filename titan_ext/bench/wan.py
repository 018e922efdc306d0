"""Rounds over a long link: ours, torchft's and plain TCP's seconds for the same bytes, and what hides behind compute.

Needs Linux and root: every site gets a network namespace whose sending is held to a rate (tc tbf); with ``--rtt`` or
``--loss`` a router of our own stands between them (TUN devices). A real lighthouse is as far from every site as they are
from each other. Elsewhere it says what is missing and ends well. It measures, in turns, so that all see the same machine:

  transfer  DiLoCo on synthetic parameters, by torchft and by ours under each codec, and plain TCP sockets that send
            as many bytes as fp32 does, over one connection and over several;
  control   a round of so few parameters that its bytes take no time, in round trips;
  overlap   Streaming DiLoCo with delay under titan_ext's trainer: tokens per second as a share of those of
            the same trainer without any communication. Both live in the same processes and take turns;
  state     what a joining site fetches (``--state-mb 400``), against plain TCP sockets that carry as much one way;
  ledger    bytes in the ledger against those that the links have carried.

With several rates or distances (``--rate-mbit 100,500 --rtt 0,80``) it goes through all pairs and ends with a table of them.

Every namespace, link and process is gone at the end, also after Ctrl-C.
"""

import argparse
import os
import tempfile
from contextlib import ExitStack
from itertools import product
from typing import Any

from titan_ext.bench.flags import listed_numbers, require_flag
from titan_ext.bench.wan_report import (
    EMPTY,
    OURS,
    PLAIN,
    STATE,
    print_links,
    report_overlap,
    report_state,
    report_transfer,
    summary,
)
from titan_ext.errors import UserError

HELP = "rounds over a long or slow link, against torchft and plain TCP (root, Linux)"

_FEW_PARAMETERS = 8e3
_TRAINERS = ("flavor", "seq_len", "batch", "sync_every", "fragments", "delay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, and size and length of the measurement."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rate-mbit", default="100", help="a site's rates of sending, comma-separated (default: 100)")
    parser.add_argument("--rtt", default="0", help="milliseconds there and back, comma-separated (default: 0)")
    parser.add_argument("--loss", type=float, default=0.0, help="per cent of the segments lost (default: 0)")
    parser.add_argument("--down-mbit", type=float, default=0.0, help="a site's rate of receiving (default: no limit)")
    parser.add_argument("--slow-mbit", type=float, default=0.0, help="rate of the last site, if it is another")
    parser.add_argument("--sites", type=int, default=2, help="number of sites (default: 2)")
    parser.add_argument("--parameters", type=float, default=10e6, help="transfer: size of the model (default: 10e6)")
    parser.add_argument("--rounds", type=int, default=3, help="transfer: timed rounds of each (default: 3)")
    parser.add_argument(
        "--codecs", default="fp32", help="transfer: codecs of ours, comma-separated; the first is fp32 (default: fp32)"
    )
    parser.add_argument("--streams", default="1,8", help="transfer: connections of plain TCP (default: 1,8)")
    parser.add_argument("--state-mb", type=float, default=0.0, help="state: size in MB; 0 leaves it out (default: 0)")
    parser.add_argument("--flavor", default="debugmodel", help="overlap: flavor of the llama3 model")
    parser.add_argument("--seq-len", type=int, default=256, help="overlap: tokens a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="overlap: sequences a step (default: 4)")
    parser.add_argument("--sync-every", type=int, default=20, help="overlap: steps between syncs (default: 20)")
    parser.add_argument("--fragments", type=int, default=2, help="overlap: parts of the model (default: 2)")
    parser.add_argument("--delay", type=int, default=8, help="overlap: steps that hide an exchange (default: 8)")
    parser.add_argument(
        "--blocks", type=int, default=3, help="overlap: turns of sync_every steps; 0 leaves it out (default: 3)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables, and return the figures; where it cannot be, only ``skipped`` with the reason.

    Raises:
        UserError: an option is out of range.
        RunError: a site failed, or sites disagree after a round.
    """
    codecs, streams = _checked(options)
    rates = listed_numbers("rate_mbit", options.rate_mbit, 0.1)
    distances = listed_numbers("rtt", options.rtt, 0.0)
    from titan_ext.links.namespaces import missing

    reason = missing()
    if reason is not None:
        print(f"skipped: {reason}")
        return {"skipped": reason}
    figures: dict[str, Any] = {
        key: getattr(options, key) for key in ("sites", "parameters", "rounds", "loss", "down_mbit", "slow_mbit")
    }
    links = [
        _measure(argparse.Namespace(**vars(options) | {"rate_mbit": rate, "rtt": rtt}), codecs, streams)
        for rate, rtt in product(rates, distances)
    ]
    figures["rows"] = [summary(rows, codecs) for rows in links]
    if len(links) > 1:
        print_links(figures["rows"])
    return {**figures, "ways": [row for rows in links for row in rows]}


def _measure(options: argparse.Namespace, codecs: list[str], streams: list[int]) -> list[dict[str, Any]]:
    """One link; a row for each way of sending, and one for what hides behind compute."""
    print(
        f"{options.sites} sites, each sending {options.rate_mbit:g} Mbit/s at most, {options.rtt:g} ms there and back, "
        f"{options.loss:g}% lost"
    )
    rows = report_transfer(_transfer(options, codecs, streams), options.rtt)
    if options.state_mb:
        rows.append(report_state(_state(options, streams)))
    if options.blocks:
        rows.append(report_overlap(_overlap(options)))
    return [{"rate_mbit": options.rate_mbit, "rtt": options.rtt, **row} for row in rows]


def _transfer(options: argparse.Namespace, codecs: list[str], streams: list[int]) -> dict[str, list[dict[str, float]]]:
    """The rounds of each way by its name: ``seconds``, ``bytes`` of the ledger, and what was ``sent``."""
    from titan_ext.bench.sync_sites import TORCHFT_BUCKETS as TORCHFT
    from titan_ext.links.namespaces import address_of

    addresses = [address_of(site) for site in range(options.sites)]
    with ExitStack() as stack:
        wan = stack.enter_context(_wan(options))
        plain = _start_plain(stack, wan, addresses, streams)
        ways = [
            (TORCHFT, TORCHFT, options.parameters),
            *((OURS.format(each), each, options.parameters) for each in codecs),
        ]
        ways += [(EMPTY.format(name), method, _FEW_PARAMETERS) for name, method, _ in ways[:2]]
        sites = {name: _start_sync(stack, wan, options, method, size) for name, method, size in ways}
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*plain, *sites)}
        payload = 0.0
        for turn in range(options.rounds + 1):
            for name, group in sites.items():
                figures = _round(name, wan, group)
                payload = figures["bytes"] if name == OURS.format(codecs[0]) else payload
                if turn:  # the first one connects the sites
                    rounds[name].append(figures)
            for name, group in plain.items():
                seconds = max(group.call("exchange", payload))
                if turn:
                    rounds[name].append({"seconds": seconds, "bytes": payload})
    return rounds


def _round(name: str, wan: Any, group: Any) -> dict[str, float]:
    """One round; it is over when the slowest site is."""
    from titan_ext.errors import RunError

    before = wan.bytes_sent()
    results = group.call("round")
    sent = max(after - start for after, start in zip(wan.bytes_sent(), before))
    if len({result.pop("checksum") for result in results}) != 1:
        raise RunError(f"{name}: the sites' parameters differ after a round")
    return {**{key: max(result[key] for result in results) for key in results[0]}, "sent": sent}


def _state(options: argparse.Namespace, streams: list[int]) -> dict[str, list[float]]:
    """By the way of sending the seconds of each turn from site 0 to site 1."""
    from titan_ext.bench.wan_state import StateSite
    from titan_ext.links.namespaces import address_of

    num_bytes, addresses = int(options.state_mb * 1e6), [address_of(site) for site in range(2)]
    with ExitStack() as stack:
        wan = stack.enter_context(_wan(argparse.Namespace(**vars(options) | {"sites": 2})))
        sites = _start_sites(stack, wan, StateSite, [(site, addresses[site], num_bytes) for site in range(2)])
        url = sites.call("url")[0]
        plain = _start_plain(stack, wan, addresses, streams)
        seconds: dict[str, list[float]] = {STATE: [], **{name: [] for name in plain}}
        for _ in range(options.rounds):
            seconds[STATE].append(max(sites.call("fetch", url)))
            for name, group in plain.items():
                seconds[name].append(max(group.call("exchange", num_bytes, 0)))
    return seconds


def _overlap(options: argparse.Namespace) -> list[dict[str, float]]:
    """One entry a block: seconds with (``streaming``) and without (``silent``) exchange, ``bytes``, ``sent``."""
    from titan_ext.bench.wan_trainers import Trainers

    with ExitStack() as stack:
        wan = stack.enter_context(_wan(options))
        url = _start_lighthouse(stack, wan, options)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sizes = {key: getattr(options, key) for key in _TRAINERS}
        arguments = [(site, url, folder, sizes, _threads(options)) for site in range(options.sites)]
        workers = _start_sites(stack, wan, Trainers, arguments)
        workers.call("warm_up")
        blocks = []
        for block in range(options.blocks):
            entry: dict[str, float] = {}
            # Who goes first changes, so that neither always finds the caches of the other.
            for name in sorted(("silent", "streaming"), reverse=bool(block % 2)):
                before = wan.bytes_sent()
                results = workers.call("take", name)
                entry[name] = max(result["seconds"] for result in results)
                if name == "streaming":
                    entry["bytes"] = results[0]["bytes"]
                    entry["sent"] = max(after - start for after, start in zip(wan.bytes_sent(), before))
                    entry["exchange"] = max(result["exchange"] for result in results)
            blocks.append(entry)
    tokens = options.sites * options.sync_every * options.batch * options.seq_len
    return [{**entry, "tokens": tokens, "delay": options.delay, "steps": options.sync_every} for entry in blocks]


def _wan(options: argparse.Namespace) -> Any:
    from titan_ext.links.namespaces import Wan

    slow = {options.sites - 1: options.slow_mbit} if options.slow_mbit else {}
    return Wan(
        options.sites,
        options.rate_mbit,
        rtt_ms=options.rtt,
        loss=options.loss / 100,
        down_mbit=options.down_mbit,
        rates_mbit=slow,
    )


def _start_lighthouse(stack: ExitStack, wan: Any, options: argparse.Namespace) -> str:
    from titan_ext.bench.sync_sites import Lighthouse
    from titan_ext.bench.workers import WorkerGroup

    lighthouse = stack.enter_context(WorkerGroup(Lighthouse, [(options.sites,)], [wan.hub]))
    return f"http://{wan.hub_address}:{lighthouse.call('port')[0]}"


def _start_sync(stack: ExitStack, wan: Any, options: argparse.Namespace, method: str, parameters: float) -> Any:
    from titan_ext.bench.sync_sites import SyncSite
    from titan_ext.links.namespaces import address_of

    url = _start_lighthouse(stack, wan, options)
    common = (options.sites, url, parameters, _threads(options))
    return _start_sites(
        stack, wan, SyncSite, [(method, site, *common, address_of(site)) for site in range(options.sites)]
    )


def _start_plain(stack: ExitStack, wan: Any, addresses: list[str], streams: list[int]) -> dict[str, Any]:
    """By name connected sockets at all of the addresses."""
    from titan_ext.bench.plain_tcp import PlainSockets

    plain = {}
    for place, count in enumerate(streams):
        arguments = [(site, addresses, count, place) for site in range(len(addresses))]
        plain[PLAIN.format(count)] = _start_sites(stack, wan, PlainSockets, arguments)
        plain[PLAIN.format(count)].call("connect")
    return plain


def _start_sites(stack: ExitStack, wan: Any, build: Any, arguments: list[tuple]) -> Any:
    from titan_ext.bench.workers import WorkerGroup

    return stack.enter_context(WorkerGroup(build, arguments, wan.sites))


def _threads(options: argparse.Namespace) -> int:
    return max(1, len(os.sched_getaffinity(0)) // options.sites)


def _checked(options: argparse.Namespace) -> tuple[list[str], list[int]]:
    from titan_ext.semi_sync.wire.codecs import CODECS

    for key, least in (("sites", 2), ("rounds", 1), ("blocks", 0), ("batch", 1), ("seq_len", 1), ("parameters", 1e4)):
        require_flag(getattr(options, key) >= least, key, getattr(options, key), f"at least {least:g}")
    for key in ("down_mbit", "slow_mbit", "state_mb"):
        require_flag(getattr(options, key) >= 0, key, getattr(options, key), "at least 0")
    require_flag(0 <= options.loss < 100, "loss", options.loss, "at least 0 and below 100")
    if options.fragments < 1 or options.sync_every % options.fragments:
        raise UserError(f"--fragments {options.fragments}: must divide --sync-every ({options.sync_every})")
    if not 0 < options.delay < options.sync_every // options.fragments:
        raise UserError(f"--delay {options.delay}: must be above 0 and below --sync-every / --fragments")
    codecs = options.codecs.split(",")
    for codec in codecs:
        require_flag(codec in CODECS, "codecs", codec, f"of {', '.join(CODECS)}")
    require_flag(codecs[0] == "fp32", "codecs", options.codecs, "fp32 first, with which the others are compared")
    streams = listed_numbers("streams", options.streams, 1, 256)
    require_flag(all(each.is_integer() for each in streams), "streams", options.streams, "whole numbers, such as 1,8")
    return codecs, [int(each) for each in streams]
