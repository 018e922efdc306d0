"""How near the outer loop comes to the limit of a slow link, and how well it hides behind compute.

Needs Linux and root: every site gets a network namespace whose sending is held to a rate (tc tbf), behind a
bridge with a real lighthouse. Elsewhere it says what is missing and ends well. It measures

  limit    fp32 DiLoCo on synthetic parameters: the seconds that plain TCP sockets take for its bytes, in turns
           with the rounds, as a share of the seconds of a round;
  overlap  Streaming DiLoCo with delay under titan_ext's trainer: tokens per second as a share of those of
           the same trainer without any communication. Both live in the same processes and take turns;
  ledger   bytes in the ledger against those that the interfaces have sent.

Every namespace, link and process is gone at the end, also after Ctrl-C.
"""

import argparse
import os
import socket
import tempfile
import threading
import time
from contextlib import ExitStack
from statistics import median
from typing import Any

from titan_ext.bench.flags import require
from titan_ext.errors import UserError

_PLAIN_PORT = 5099

HELP = "share of a slow link's limit, and of the speed without communication (root, Linux)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, and size and length of the measurement."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rate-mbit", type=float, default=100.0, help="a site's rate of sending (default: 100)")
    parser.add_argument("--sites", type=int, default=2, help="number of sites (default: 2)")
    parser.add_argument("--parameters", type=float, default=10e6, help="limit: size of the model (default: 10e6)")
    parser.add_argument("--rounds", type=int, default=3, help="limit: timed rounds (default: 3)")
    parser.add_argument("--flavor", default="debugmodel", help="overlap: flavor of the llama3 model")
    parser.add_argument("--seq-len", type=int, default=256, help="overlap: tokens a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=4, help="overlap: sequences a step (default: 4)")
    parser.add_argument("--sync-every", type=int, default=20, help="overlap: steps between syncs (default: 20)")
    parser.add_argument("--fragments", type=int, default=2, help="overlap: parts of the model (default: 2)")
    parser.add_argument("--delay", type=int, default=8, help="overlap: steps that hide an exchange (default: 8)")
    parser.add_argument("--blocks", type=int, default=3, help="overlap: turns of sync_every steps (default: 3)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return the figures; where it cannot be, only ``skipped`` with the reason.

    Raises:
        UserError: an option is out of range.
        RunError: a site failed.
    """
    _check(options)
    from titan_ext.bench.namespaces import missing

    reason = missing()
    if reason is not None:
        print(f"skipped: {reason}")
        return {"skipped": reason}
    figures: dict[str, Any] = {"rate_mbit": options.rate_mbit, "sites": options.sites}
    print(f"{options.sites} sites, each sending {options.rate_mbit:g} Mbit/s at most")
    figures["limit"] = _report_limit(_limit(options))
    figures["overlap"] = _report_overlap(_overlap(options))
    return figures


def _limit(options: argparse.Namespace) -> list[dict[str, float]]:
    """One entry a round: its seconds (``round``), the ``nominal`` ones of its bytes at the link's rate, those that a plain TCP
    socket takes for them (``wire``), the ledger's ``bytes`` and what was ``sent``."""
    from titan_ext.bench.namespaces import address_of
    from titan_ext.bench.sync_sites import SyncSite

    with ExitStack() as stack:
        wan, url = _network(stack, options)
        common = (options.sites, url, options.parameters, _threads(options))
        workers = _start_sites(stack, wan, SyncSite, [("fp32", site, *common) for site in range(options.sites)])
        addresses = [address_of(site) for site in range(options.sites)]
        sockets = _start_sites(stack, wan, PlainSocket, [(site, addresses) for site in range(options.sites)])
        sockets.call("connect")
        workers.call("round")  # connects the sites
        rounds = []
        for _ in range(options.rounds):
            before = wan.bytes_sent()
            results = workers.call("round")
            sent = [after - start for after, start in zip(wan.bytes_sent(), before)]
            payload = results[0]["bytes"]
            rounds.append(
                {
                    "round": max(result["seconds"] for result in results),
                    "nominal": payload * 8 / (options.rate_mbit * 1e6),
                    "wire": max(sockets.call("exchange", payload)),
                    "bytes": payload,
                    "sent": max(sent),
                    **{key: max(result[key] for result in results) for key in ("quorum", "reduce", "apply")},
                }
            )
    return rounds


def _overlap(options: argparse.Namespace) -> list[dict[str, float]]:
    """One entry a block: seconds with (``streaming``) and without (``silent``) exchange, ``bytes``, ``sent``."""
    from titan_ext.bench.wan_trainers import Trainers

    with ExitStack() as stack:
        wan, url = _network(stack, options)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        arguments = [(site, url, folder, options, _threads(options)) for site in range(options.sites)]
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


def _network(stack: ExitStack, options: argparse.Namespace):
    from titan_ext.bench.namespaces import Wan
    from titan_ext.bench.sync_sites import Lighthouse
    from titan_ext.bench.workers import WorkerGroup

    wan = stack.enter_context(Wan(options.sites, options.rate_mbit))
    lighthouse = stack.enter_context(WorkerGroup(Lighthouse, [(options.sites,)], [wan.hub]))
    return wan, f"http://{wan.hub_address}:{lighthouse.call('port')[0]}"


def _start_sites(stack: ExitStack, wan, build, arguments: list[tuple]):
    from titan_ext.bench.workers import WorkerGroup

    return stack.enter_context(WorkerGroup(build, arguments, wan.sites))


def _threads(options: argparse.Namespace) -> int:
    return max(1, len(os.sched_getaffinity(0)) // options.sites)


def _report_limit(rounds: list[dict[str, float]]) -> dict[str, float]:
    difference = median(each["sent"] / each["bytes"] - 1 for each in rounds)
    parts = {
        key: median(each[key] for each in rounds) for key in ("round", "wire", "nominal", "quorum", "reduce", "apply")
    }
    shares = {key: median(each[key] / each["round"] for each in rounds) for key in ("wire", "nominal")}
    print(
        f"limit:   {rounds[0]['bytes'] / 1e6:.2f} MB a round in {parts['round']:.3f} s (quorum {parts['quorum']:.3f}, reduction "
        f"{parts['reduce']:.3f}, vote and apply {parts['apply']:.3f})"
    )
    print(
        f"         plain TCP sockets need {parts['wire']:.3f} s for them: {shares['wire']:.1%} of that limit; "
        f"the nominal rate {parts['nominal']:.3f} s: {shares['nominal']:.1%}"
    )
    print(f"ledger:  the interface sent {difference:+.2%} of the ledger's bytes in a round")
    return {
        **{f"{key}_seconds": round(value, 4) for key, value in parts.items()},
        "share_of_plain_tcp": round(shares["wire"], 4),
        "share_of_nominal": round(shares["nominal"], 4),
        "ledger_difference": round(difference, 4),
    }


def _report_overlap(blocks: list[dict[str, float]]) -> dict[str, Any]:
    first = blocks[0]
    ratio = median(each["silent"] / each["streaming"] for each in blocks)
    rates = {name: median(each["tokens"] / each[name] for each in blocks) for name in ("silent", "streaming")}
    exchange = median(each["exchange"] for each in blocks)
    hidden = first["delay"] * median(each["silent"] for each in blocks) / first["steps"]
    difference = sum(each["sent"] for each in blocks) / sum(each["bytes"] for each in blocks) - 1
    print(
        f"overlap: {rates['silent']:,.0f} tokens/s without communication, {rates['streaming']:,.0f} with: {ratio:.1%}"
    )
    fits = "fits" if exchange < hidden else "does NOT fit"
    print(f"         an exchange of {exchange:.2f} s {fits} into the {hidden:.2f} s of {first['delay']:.0f} steps")
    print(f"ledger:  the interface sent {difference:+.2%} of the ledger's bytes while training")
    return {
        **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()},
        "ratio": round(ratio, 4),
        "exchange_seconds": round(exchange, 4),
        "hidden_seconds": round(hidden, 4),
        "ledger_difference": round(difference, 4),
    }


def _check(options: argparse.Namespace) -> None:
    for key, least in (("sites", 2), ("rounds", 1), ("blocks", 1), ("batch", 1), ("seq_len", 1), ("parameters", 1e4)):
        require(getattr(options, key) >= least, key, getattr(options, key), f"at least {least:g}")
    require(options.rate_mbit > 0, "rate_mbit", options.rate_mbit, "above 0")
    if options.fragments < 1 or options.sync_every % options.fragments:
        raise UserError(f"--fragments {options.fragments}: must divide --sync-every ({options.sync_every})")
    if not 0 < options.delay < options.sync_every // options.fragments:
        raise UserError(f"--delay {options.delay}: must be above 0 and below --sync-every / --fragments")


class PlainSocket:
    """A plain TCP socket: a site that sends to the next one of a ring while it receives from the one before.

    Args:
        site: index of this site.
        addresses: of all sites.
    """

    def __init__(self, site: int, addresses: list[str]) -> None:
        self._server = socket.create_server((addresses[site], _PLAIN_PORT))
        self._next = (addresses[(site + 1) % len(addresses)], _PLAIN_PORT)
        self._out: socket.socket | None = None
        self._in: socket.socket | None = None

    def connect(self) -> None:
        """Once all sites listen."""
        self._out = socket.create_connection(self._next)
        self._in, _ = self._server.accept()

    def exchange(self, num_bytes: int) -> float:
        """Seconds to send, and to receive, ``num_bytes``."""
        started = time.perf_counter()
        sending = threading.Thread(target=self._out.sendall, args=(bytes(num_bytes),))
        sending.start()
        space = bytearray(2**20)
        missing = num_bytes
        while missing > 0:
            count = self._in.recv_into(space, min(missing, len(space)))
            if not count:
                raise ConnectionError("the site before closed its connection")
            missing -= count
        sending.join()
        return time.perf_counter() - started
