"""The planner against the laboratory: utilisation by steps a round and by rate of the links.

The grid of diloco-measured (30.8M parameters, four sites, 1 to 128 steps a round, 50 Mbit/s to 5 Gbit/s), predicted by
``titan-ext plan`` and rehearsed by ``titan-ext lab`` in virtual time, where compute and transfer are those of the grid and
cost nothing. The same for an 8-bit codec, for Streaming DiLoCo and for DES-LOC. A cell's ratio is that of the likely
utilisation to the rehearsed one, the larger by the smaller. Beside DiLoCo's cells stand what its authors measured, with
steps of their GPUs, which they do not tell: for orientation only.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag

HELP = "how near the planner comes to the laboratory"

_NUMBERS: Numbers = {
    "sites": (4, 2, "how many"),
    "step_ms": (22.0, 0.1, "milliseconds of an inner step"),
    "rtt_ms": (1.0, 0.0, "round-trip time of every link in milliseconds"),
    "rounds": (4, 2, "of each cell"),
    "seed": (0, 0, "of the rehearsals"),
}
_PERIODS = (1, 8, 32, 128)
_MBIT = (50, 200, 1000, 5000)
# diloco-measured's README: compute utilisation in percent, four L40S over TCP behind tc.
_PUBLISHED = {
    50: (0.07, 0.55, 2.41, 11.55),
    200: (0.32, 2.48, 10.0, 36.1),
    1000: (1.74, 12.4, 36.0, 71.5),
    5000: (7.8, 40.2, 68.1, 87.0),
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "diloco": {},
    "int8": {"codec": "int8"},
    "streaming": {"num_fragments": 4, "fragment_sync_delay": 2},
    "des_loc": {"method": "des_loc"},
}
_MOST_RATIO = 1.2
_FILE = """
[model]
name = "llama3"
flavor = "debugmodel"
dim = 512
n_layers = 6
n_heads = 8
ffn_dim = 2048
vocab_size = 5632

[training]
seq_len = 512
local_batch_size = 8

[semi_sync]
method = "diloco"
sync_every = 8

[[site]]
name = "site0"
data = "builtin:code"
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a grid."""

    variant: str
    period: int
    mbit: int
    planned: Any
    """``Range`` of the utilisation."""
    rehearsed: float

    @property
    def ratio(self) -> float:
        """Of the two, the larger by the smaller."""
        return max(self.planned.likely / self.rehearsed, self.rehearsed / self.planned.likely)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's flags."""
    add_numbers(parser, _NUMBERS)
    parser.add_argument(
        "--variants", default=",".join(_VARIANTS), help=f"of {', '.join(_VARIANTS)}, with commas (default: all)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print the grids; the figures are the largest ratio and the share of cells that the interval covers, by variant."""
    check_numbers(options, _NUMBERS)
    variants = options.variants.split(",")
    for variant in variants:
        require_flag(variant in _VARIANTS, "variants", variant, f"one of {', '.join(_VARIANTS)}")
    figures: dict[str, Any] = {}
    every: list[Cell] = []
    base = _load()
    for variant in variants:
        cells = list(_cells(variant, base, options))
        every += cells
        _print(variant, cells)
        figures[variant] = _figures(cells)
    within = all(cell.ratio <= _MOST_RATIO for cell in every)
    return {**figures, **_figures(every), "within": within, "rows": [_row(each) for each in every]}


def _cells(variant: str, base: Any, options: argparse.Namespace) -> Iterator[Cell]:
    for period in _PERIODS:
        settings = _VARIANTS[variant]
        apart, left = divmod(period, settings.get("num_fragments", 1))
        if left or settings.get("fragment_sync_delay", 0) >= apart:
            continue  # no room for that many fragments, or for the flight of one
        sites = _sites(base, options.sites, {**settings, "sync_every": period}, period * options.rounds)
        for mbit in _MBIT:
            yield cell(variant, sites, period, mbit, options)


def cell(variant: str, sites: Sequence[Any], period: int, mbit: int, options: argparse.Namespace) -> Cell:
    """Plan and rehearse one cell."""
    from titan_ext.lab.build import Request as LabRequest
    from titan_ext.lab.build import make_script
    from titan_ext.lab.rehearsal import Rehearsal
    from titan_ext.links.link import parse_links
    from titan_ext.planner.build import site_wiring, step_times
    from titan_ext.planner.prediction import Surroundings, predict
    from titan_ext.planner.workload import workload

    link, step = [f"{mbit}mbit,{options.rtt_ms}ms"], [f"{options.step_ms}ms"]
    names = [site.name for site in sites]
    wiring = site_wiring(sites, parse_links(link, names))
    around = Surroundings(wiring=wiring, step_seconds=step_times(sites, step, None))
    planned = predict(workload(sites), around).utilisation
    script = make_script(sites, LabRequest(links=link, steps=step, seed=options.seed))
    return Cell(variant, period, mbit, planned, Rehearsal(script).run().utilisation)


def _load() -> Any:
    from titan_ext.config.load import load_run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "grid.toml")
        path.write_text(_FILE)
        return load_run(path, needs=()).sites[0]


def _sites(base: Any, count: int, settings: dict[str, Any], steps: int) -> list[Any]:
    """``count`` sites like ``base`` with other settings of the outer loop."""
    from titan_ext.planner.workload import with_settings

    named = [replace(base, name=f"site{place}", index=place, count=count) for place in range(count)]
    changed = with_settings(named, **settings)
    for site in changed:
        site.config.training = replace(site.config.training, steps=steps)
    return changed


def _print(variant: str, cells: Sequence[Cell]) -> None:
    print(f"{variant}: utilisation in percent, rehearsed / planned (interval)")
    print("          " + "".join(f"{mbit:>20} Mbit/s" for mbit in _MBIT))
    for period in dict.fromkeys(each.period for each in cells):
        texts = [_text(each) for each in cells if each.period == period]
        print(f"  H = {period:<4}" + "".join(f"{text:>27}" for text in texts))
        if variant == "diloco":
            place = _PERIODS.index(period)
            print("  measured" + "".join(f"{_PUBLISHED[mbit][place]:>27}" for mbit in _MBIT))
    found = _figures(cells)
    print(
        f"  largest ratio {found['largest_ratio']:.3f}; the interval covers {found['covered']:.0%} of {len(cells)} cells"
    )


def _text(each: Cell) -> str:
    likely, low, high = (100 * value for value in (each.planned.likely, each.planned.low, each.planned.high))
    return f"{100 * each.rehearsed:.2f} / {likely:.2f} ({low:.1f}-{high:.1f})"


def _row(each: Cell) -> dict[str, Any]:
    """The cell in percent."""
    planned = {key: round(100 * getattr(each.planned, key), 2) for key in ("likely", "low", "high")}
    about = {"variant": each.variant, "steps_a_round": each.period, "mbit": each.mbit}
    return {**about, "rehearsed": round(100 * each.rehearsed, 2), **planned}


def _figures(cells: Sequence[Cell]) -> dict[str, float]:
    covered = sum(cell.rehearsed in cell.planned for cell in cells)
    return {
        "cells": len(cells),
        "largest_ratio": round(max(cell.ratio for cell in cells), 4),
        "covered": round(covered / len(cells), 4),
    }
