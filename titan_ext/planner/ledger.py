"""What a run has measured: step times and rounds from its sites' ``metrics.jsonl``, to calibrate a plan and to check it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from titan_ext.errors import UserError
from titan_ext.planner.range import Range

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
        seconds=steps[-1]["time"] - steps[0]["time"],
        steps=steps[-1]["step"] - steps[0]["step"],
        failed_rounds=sum(line["kind"] == "round" and not line["committed"] for line in lines[first]),
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
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                if line["kind"] in ("step", "round"):
                    yield line
            except (ValueError, KeyError, TypeError):
                if text.endswith("\n"):  # else it is being written
                    raise UserError(f"--from: {path}, line {number} is no line of metrics.jsonl") from None


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
        if line["kind"] == "round" and line["committed"] and line["sites"] > 1 and line["bytes_sent"]:
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
