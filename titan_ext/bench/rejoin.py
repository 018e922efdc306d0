"""Seconds until a killed site counts again, and what the others lose by it: torchft's DiLoCo and ours.

Every site is a process on this machine that holds a synthetic model and takes inner steps of a given length.
The last one ends by SIGKILL, half-way between two rounds (inner) or within one (reduce), and is started
again after a while. Both methods meet at a lighthouse with the same settings and go through the same in turns.

  rejoin   from the moment when the new process has imported everything and built its model, until the
           first round is committed that counts an inner step of it
  longest  that a survivor's inner loop stood still at a time, from the kill to that round
  waited   the same, all in all
  wasted   the same, and what the survivor's lost inner steps had taken
  lost     inner steps of survivors that no round counted: each adds 1 to a parameter of its site, which is
           looked for in the global parameters
"""

import argparse
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers
from titan_ext.errors import RunError

if TYPE_CHECKING:
    from titan_ext.bench.rejoin_sites import Attempt

HELP = "seconds until a killed site is back, and what survivors lose, against torchft's DiLoCo"

_SECONDS = ("rejoin", "longest", "waited", "wasted")
_OPTIONS: Numbers = {
    # default, least, help
    "sites": (3, 3, "number of sites"),
    "parameters": (1e6, 1e5, "size of the model"),
    "sync_every": (20, 4, "inner steps between rounds"),
    "step_seconds": (0.05, 0.001, "length of an inner step"),
    "kill_round": (3, 1, "committed rounds before the kill"),
    "down_seconds": (8.0, 0.0, "from the kill to the new process's start in the run"),
    "repeats": (2, 1, "runs of each method and kind of kill"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the run, and when the site dies."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_numbers(parser, _OPTIONS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, and return its rows.

    Raises:
        UserError: an option is out of range.
        RunError: a site failed.
    """
    check_numbers(options, _OPTIONS)
    from titan_ext.bench.rejoin_sites import INNER, OURS, REDUCE
    from titan_ext.bench.sync_sites import TORCHFT

    rows = []
    print(_line("killed", "method", *(f"{key} s" for key in _SECONDS), "lost"))
    for where in (INNER, REDUCE):
        methods = (TORCHFT, OURS)
        runs = [{method: _measure(method, where, options) for method in methods} for _ in range(options.repeats)]
        for method in methods:
            figures = {key: round(median(each[method][key] for each in runs), 3) for key in (*_SECONDS, "lost")}
            print(_line(where, method, *(f"{value:.2f}" for value in figures.values())), flush=True)
            rows.append({"killed": where, "method": method, **figures})
        ratios = {key: median(each[OURS][key] / each[TORCHFT][key] for each in runs) for key in _SECONDS}
        print(_line("", "ours/torchft", *(f"{ratio:.2f}" for ratio in ratios.values())), flush=True)
        rows[-1] |= {f"{key}_ratio": round(ratio, 3) for key, ratio in ratios.items()}
    return {"sites": options.sites, "parameters": options.parameters, "rows": rows}


def _line(*cells: str) -> str:
    return f"{cells[0]:<8}{cells[1]:<14}" + "".join(f"{cell:>12}" for cell in cells[2:])


def _measure(method: str, where: str, options: argparse.Namespace) -> dict[str, float]:
    """One run's figures by name; seconds but for the inner steps ``lost``."""
    from titan_ext.bench.rejoin_sites import MIN_SITES, Settings, Site
    from titan_ext.bench.sync_sites import Lighthouse
    from titan_ext.bench.workers import WorkerGroup

    keys = ("sites", "parameters", "sync_every", "step_seconds")
    settings = Settings(**{key: getattr(options, key) for key in keys})
    last = options.sites - 1
    with ThreadPoolExecutor(options.sites + 1) as pool, ExitStack() as stack:
        lighthouse = stack.enter_context(WorkerGroup(Lighthouse, [(MIN_SITES,)]))
        url = f"http://127.0.0.1:{lighthouse.call('port')[0]}"

        def start(site: int) -> WorkerGroup:
            return stack.enter_context(WorkerGroup(Site, [(method, site, url, settings)]))

        sites = [start(site) for site in range(options.sites)]
        survivors = [pool.submit(each.call, "train") for each in sites[:last]]
        victim = pool.submit(sites[last].call, "train", where, options.kill_round)
        if victim.exception() is None:
            raise RunError(f"{method}: the site that was to be killed after round {options.kill_round} was not")
        killed = time.monotonic()
        again = start(last)
        time.sleep(max(0.0, killed + options.down_seconds - time.monotonic()))
        back = time.monotonic()
        newcomer = pool.submit(again.call, "train")
        if newcomer in wait([*survivors, newcomer], return_when=FIRST_COMPLETED).done:
            newcomer.result()  # it goes on until the survivors have ended, unless it failed
        attempts = [survivor.result()[0] for survivor in survivors]
    return _figures(attempts, killed, back, options)


def _figures(
    attempts: list[list["Attempt"]], killed: float, back: float, options: argparse.Namespace
) -> dict[str, float]:
    """From the survivors' rounds, the last of which counts the newcomer, and the moments of kill and return."""
    counted = attempts[0][-1].time
    waits = [[each.waited for each in own if each.time > killed] for own in attempts]
    lost = [sum(each.lost for each in own) for own in attempts]
    return {
        "rejoin": counted - back,
        "longest": max(max(own) for own in waits),
        "waited": max(sum(own) for own in waits),
        "wasted": max(sum(own) + options.step_seconds * steps for own, steps in zip(waits, lost)),
        "lost": sum(lost),
    }
