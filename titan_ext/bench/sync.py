"""Seconds, bytes and memory of a round: torchft's DiLoCo and ours, on the same parameters.

Every site is a process on this machine with a synthetic model of Llama's shapes; sites meet at a real
lighthouse and exchange over loopback, in fp32 or under one of our codecs. torchft's rounds alternate
with those of the one it is compared with, so both see the same machine. Bytes are what a site sends, by
the ring's formula; memory is the peak during a round, counted from before the model was made.
"""

import argparse
import math
import os
from statistics import median
from typing import Any

from titan_ext.errors import RunError, UserError

HELP = "seconds, bytes and memory of a round, against torchft's DiLoCo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size and length of the measurement."""
    parser.add_argument("--parameters", type=float, default=100e6, help="size of the model (default: 100e6)")
    parser.add_argument("--sites", default="2,4", help="numbers of sites, comma-separated (default: 2,4)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each (default: 3)")
    parser.add_argument(
        "--codecs", default="fp32,bf16,int8,int4", help="codecs of ours to measure (default: fp32,bf16,int8,int4)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return the rows.

    Raises:
        UserError: an option is out of range.
        RunError: a site failed, or sites disagree after a round.
    """
    sites, codecs = _checked(options)
    from titan_ext.bench.sync_sites import TORCHFT_BUCKETS

    print(_line("method", "sites", "s/round", "MB sent", "peak MB", "time", "bytes", "memory"))
    rows = []
    for count in sites:
        rows += _measure(count, [TORCHFT_BUCKETS, *codecs], options)
    print("s/round: median; time, bytes, memory: as a share of torchft's in neighbouring rounds")
    return {"parameters": options.parameters, "rows": rows}


def _measure(sites: int, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    from titan_ext.bench.sync_sites import TORCHFT

    theirs, rows = [], []
    with _Group(TORCHFT, sites, options) as reference:
        for name in names:
            with _Group(name, sites, options) as group:
                pairs = [(reference.round(), group.round()) for _ in range(options.rounds)]
            theirs += [pair[0] for pair in pairs]
            rows.append(_row(name, sites, [pair[1] for pair in pairs], [pair[0] for pair in pairs]))
    rows.insert(0, _row(TORCHFT, sites, theirs, theirs))
    for row in rows:
        print(_described(row), flush=True)
    return rows


class _Group:
    """All sites of one method, past their first round, which connects them."""

    def __init__(self, name: str, sites: int, options: argparse.Namespace) -> None:
        from titan_ext.bench.sync_sites import Lighthouse, SyncSite
        from titan_ext.bench.workers import WorkerGroup

        threads = max(1, len(os.sched_getaffinity(0)) // sites)
        self._name = name
        self._lighthouse = WorkerGroup(Lighthouse, [(sites,)])
        try:
            url = f"http://127.0.0.1:{self._lighthouse.call('port')[0]}"
            arguments = [(name, site, sites, url, options.parameters, threads) for site in range(sites)]
            self._crew = WorkerGroup(SyncSite, arguments)
        except BaseException:
            self._lighthouse.close()
            raise

    def __enter__(self) -> "_Group":
        try:
            self.round()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._crew.close()
        self._lighthouse.close()

    def round(self) -> dict[str, float]:
        """One round; it is over when the slowest site is."""
        results = self._crew.call("round")
        if len({result["checksum"] for result in results}) != 1:
            raise RunError(f"{self._name}: the sites' parameters differ after a round")
        return {key: max(result[key] for result in results) for key in ("seconds", "bytes", "peak_bytes")}


def _row(name: str, sites: int, rounds: list[dict], reference: list[dict]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name if name.startswith("torchft") else f"ours, {name}", "sites": sites}
    for key in ("seconds", "bytes", "peak_bytes"):
        row[key] = round(median(each[key] for each in rounds), 4)
        shares = [own[key] / other[key] if other[key] else math.nan for own, other in zip(rounds, reference)]
        row[f"{key}_ratio"] = round(median(shares), 4)
    return row


def _described(row: dict[str, Any]) -> str:
    return _line(
        row["method"],
        str(row["sites"]),
        f"{row['seconds']:.3f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        *(f"{row[f'{key}_ratio']:.3f}" for key in ("seconds", "bytes", "peak_bytes")),
    )


def _line(method: str, *values: str) -> str:
    return f"{method:<18}" + "".join(f"{value:>9}" for value in values)


def _checked(options: argparse.Namespace) -> tuple[list[int], list[str]]:
    from titan_ext.semi_sync.wire.codecs import CODECS

    try:
        sites = [int(each) for each in options.sites.split(",")]
    except ValueError:
        sites = []
    if not sites or min(sites) < 2:
        raise UserError(f"--sites {options.sites}: must be numbers of at least 2, such as 2,4")
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: must be at least 1")
    if not options.parameters >= 1e4:
        raise UserError(f"--parameters {options.parameters:g}: must be at least 1e4")
    codecs = options.codecs.split(",")
    for codec in codecs:
        if codec not in CODECS:
            raise UserError(f"--codecs {codec}: must be of {', '.join(CODECS)}")
    return sites, codecs
