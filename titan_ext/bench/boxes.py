"""Tokens a second of unequal sites together: rounds boxed by measured speed against rounds of fixed steps.

Every site is a process on this machine that trains a small network; sites meet at a real lighthouse and exchange over
loopback. Inner steps of the last site last longer by a pause that its outer loop does not know of. With fixed steps all
wait for it; boxed by speed (``semi_sync.round_box = "speed"``) it takes fewer steps a round; in the control each site
takes a random part of the steps. The three run at the same time, so that all see the same machine: an inner step is
mostly a pause. Only the first round, which connects the sites and in which speeds are learned, does not count.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Literal

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers
from titan_ext.errors import RunError

HELP = "tokens per second of unequal sites, boxed by speed against fixed steps"

_NUMBERS: Numbers = {
    "sites": (2, 2, "sites, of which the last is slow"),
    "slowdown": (3.0, 1.0, "times that a step takes longer at the slow site"),
    "sync_every": (32, 2, "inner steps of a round at the fast sites"),
    "step_ms": (50.0, 1.0, "milliseconds of an inner step at the fast sites"),
    "rounds": (8, 1, "rounds of each arm"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size and length of the measurement."""
    add_numbers(parser, _NUMBERS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return a row for each arm.

    Raises:
        UserError: an option is out of range.
        RunError: a site failed, or sites disagree after a round.
    """
    check_numbers(options, _NUMBERS)
    from titan_ext.bench.boxes_sites import RANDOM, Arm

    arms = [Arm(name, box, options.sync_every) for name, box in _ARMS] + [Arm(RANDOM, "steps", options.sync_every)]
    with ExitStack() as stack:
        crews = {arm.name: stack.enter_context(_crew(arm, options)) for arm in arms}
        with ThreadPoolExecutor(len(crews)) as pool:
            results = pool.map(lambda crew: crew.call("rounds", options.rounds), crews.values())
            rounds = {name: list(zip(*sites, strict=True)) for name, sites in zip(crews, results, strict=True)}
        for name, crew in crews.items():
            if len(set(crew.call("checksum"))) != 1:
                raise RunError(f"{name}: the sites' parameters differ after a round")
    rows = [_row(name, each) for name, each in rounds.items()]
    _print(rows)
    return {"slowdown": options.slowdown, "sites": options.sites, "rows": rows}


_ARMS: tuple[tuple[str, Literal["steps", "speed"]], ...] = (("fixed steps", "steps"), ("boxed by speed", "speed"))


@contextmanager
def _crew(arm: Any, options: argparse.Namespace) -> Iterator[Any]:
    from titan_ext.bench.boxes_sites import PacedSite
    from titan_ext.bench.sync_sites import Lighthouse
    from titan_ext.bench.workers import WorkerGroup

    count, seconds = options.sites, options.step_ms / 1000
    with WorkerGroup(Lighthouse, [(count,)]) as lighthouse:
        url = f"http://127.0.0.1:{lighthouse.call('port')[0]}"
        pace = [seconds] * (count - 1) + [seconds * options.slowdown]
        with WorkerGroup(PacedSite, [(arm, site, count, url, pace[site]) for site in range(count)]) as crew:
            yield crew


def _row(name: str, rounds: list[tuple[dict[str, float], ...]]) -> dict[str, Any]:
    seconds = [max(site["seconds"] for site in each) for each in rounds]
    rates = [sum(site["tokens"] for site in each) / time for each, time in zip(rounds, seconds, strict=True)]
    return {
        "arm": name,
        "tokens_per_second": round(
            sum(rate * time for rate, time in zip(rates, seconds, strict=True)) / sum(seconds), 1
        ),
        "round_seconds": round(median(seconds), 4),
        "steps": [round(median(each[site]["steps"] for each in rounds)) for site in range(len(rounds[0]))],
        "waited": round(
            max(sum(each[site]["waited"] for each in rounds) for site in range(len(rounds[0]))) / sum(seconds), 4
        ),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'rounds':<16}{'tokens/s':>12}{'of fixed':>10}{'s/round':>10}{'waiting':>10}  steps of each site")
    for row in rows:
        row["of_fixed"] = round(row["tokens_per_second"] / rows[0]["tokens_per_second"], 3)
        print(
            f"{row['arm']:<16}{row['tokens_per_second']:>12,.1f}{row['of_fixed']:>10.2f}{row['round_seconds']:>10.2f}"
            f"{row['waited']:>10.0%}  {', '.join(map(str, row['steps']))}"
        )
    print("tokens/s: of all sites together; waiting: the largest part of its time that a site did not train")
