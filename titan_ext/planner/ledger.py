"""What a run has measured: step times and rounds from its sites' ``metrics.jsonl``, to calibrate a plan and to check it."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from titan_ext.errors import UserError
from titan_ext.planner.range import Range

_NUMBERS = {
    "step": ("step", "time"),
    "round": ("seconds_quorum", "seconds_reduce", "seconds_apply", "bytes_sent", "sites"),
}
"""That are read of a line of each kind."""
_FEWEST = 3
"""Lines below which nothing can be said of a step or a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRound:
    """A kind of round, over all sites and times."""

    rules: tuple[str, ...]
    times: int
    """At one site."""
    site_bytes: float
    sync_seconds: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run has measured."""

    folder: str
    step_seconds: dict[str, Range]
    """By site."""
    step_jitter: float
    rounds: tuple[MeasuredRound, ...]
    seconds: float
    """From the first step's line to the last."""
    steps: int
    """Between these two."""
    failed_rounds: int

    @property
    def utilisation(self) -> float:
        """Share of the time in which inner steps were taken."""
        slowest = max(each.likely for each in self.step_seconds.values())
        return min(1.0, slowest * self.steps / self.seconds)


def read_run(folder: str, sites: Sequence[str]) -> Measured:
    """Read what the sites of a run have measured.

    Args:
        folder: the run's, with a folder for each site, or that of one site.
        sites: names of those of the file.

    Raises:
        UserError: there is no such folder, or too little in it.
    """
    files = {site: Path(folder, site, "metrics.jsonl") for site in sites}
    found = {site: path for site, path in files.items() if path.is_file()}
    if not found and Path(folder, "metrics.jsonl").is_file():
        found = {Path(folder).resolve().name: Path(folder, "metrics.jsonl")}
    if not found:
        raise UserError(f"--from {folder}: no metrics.jsonl in it or in a folder {', '.join(sites)} of it")
    lines = {site: list(_lines(path)) for site, path in found.items()}
    samples = {site: _step_samples(each) for site, each in lines.items()}
    for site, each in samples.items():
        if len(each) < _FEWEST:
            raise UserError(
                f"--from {folder}: {found[site]} tells {len(each)} step times; at least {_FEWEST} are needed "
                "(a longer run, or a smaller metrics.log_freq)"
            )
    first = next(iter(lines))
    steps = [line for line in lines[first] if line["kind"] == "step"]
    return Measured(
        folder=folder,
        step_seconds={site: _spread(each) for site, each in samples.items()},
        step_jitter=max(map(_jitter, samples.values())),
        rounds=tuple(_rounds([line for each in lines.values() for line in each], len(lines))),
        # A clock that was set back takes nothing away.
        seconds=sum(max(0.0, after["time"] - before["time"]) for before, after in pairwise(steps)),
        steps=steps[-1]["step"] - steps[0]["step"],
        failed_rounds=sum(line["kind"] == "round" and not line.get("committed") for line in lines[first]),
    )


def measured_step(path: Path) -> Range:
    """Seconds of an inner step by a site's ``metrics.jsonl``.

    Raises:
        UserError: there are too few lines.
    """
    samples = _step_samples(list(_lines(path)))
    if len(samples) < _FEWEST:
        raise UserError(f"{path} tells {len(samples)} step times; at least {_FEWEST} are needed")
    return _spread(samples)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The steps and rounds; lines that are no JSON are what a process that was killed had half written."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for place, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            kind = line.get("kind") if isinstance(line, dict) else None
            for key in _NUMBERS.get(kind, ()) if isinstance(kind, str) else ():
                if not _is_number(line.get(key)):
                    raise UserError(f"--from: {path}, line {place}: {key} = {line.get(key)!r}: must be a number")
            if kind == "round" and not isinstance(line.get("rules"), list):
                raise UserError(f"--from: {path}, line {place}: rules = {line.get('rules')!r}: must be a list")
            if kind in ("step", "round"):
                yield line


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _step_samples(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of an inner step between neighbouring lines, without rounds; where a run went on after a stop, none."""
    samples = []
    last, syncing = None, 0.0
    for line in lines:
        if line["kind"] == "round":
            syncing += line["seconds_quorum"] + line["seconds_reduce"] + line["seconds_apply"]
            continue
        if last is not None and line["step"] > last["step"]:
            seconds = line["time"] - last["time"] - syncing
            if seconds > 0:
                samples.append(seconds / (line["step"] - last["step"]))
        last, syncing = line, 0.0
    # The first one compiles, warms up and connects.
    return samples[1:]


def _rounds(lines: Sequence[dict[str, Any]], sites: int) -> Iterator[MeasuredRound]:
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "round" and line.get("committed") and line["sites"] > 1 and line["bytes_sent"]:
            kinds.setdefault(tuple(line["rules"]), []).append(line)
    for rules, found in kinds.items():
        seconds = [each["seconds_quorum"] + each["seconds_reduce"] + each["seconds_apply"] for each in found]
        yield MeasuredRound(
            rules=rules,
            times=round(len(found) / sites),
            site_bytes=median(each["bytes_sent"] for each in found),
            sync_seconds=_spread(seconds),
        )


def _jitter(samples: Sequence[float]) -> float:
    """Half of the distance between which two of three lie, as a share of the median; the far ones do not count."""
    cuts = quantiles(samples, n=6, method="inclusive")
    return (cuts[-1] - cuts[0]) / 2 / median(samples)


def _spread(samples: Sequence[float]) -> Range:
    """Mean, of which totals are made, and the bounds between which nine of ten lie."""
    if len(samples) < 2:
        return Range.around(samples[0], 0.8, 1.25)
    cuts = quantiles(samples, n=20, method="inclusive")
    mean = fmean(samples)
    return Range(min(cuts[0], mean), mean, max(cuts[-1], mean))
