"""Several runs side by side: their totals, their losses with the spread over seeds, and the settings that differ."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from titan_ext.instruments.plot import AXES
from titan_ext.instruments.run import Mark
from titan_ext.instruments.snapshot import LETTERS, settings_of

_BUCKETS = 160
_OF_A_SEED = "debug.seed"
"""The setting in which runs of one group may differ."""
_NAMED_BY = 3
"""Settings in a group's name, at most."""


def compare(shots: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The runs as JSON values for the page.

    Args:
        shots: snapshots by the runs' names.
        configs: what the sites of each run are configured with, as far as it is known: one site's ``config.json``.
    """
    settings = settings_of(configs)
    groups = _groups(list(shots), settings["differing"])
    longest = max(
        (step for shot in shots.values() for site in shot["sites"] for step in site["curve"]["step"]), default=1
    )
    return {
        "runs": [_totals(name, shot) for name, shot in shots.items()],
        "groups": [
            {"name": name, "runs": runs, "curves": _spread([_run_curve(shots[run], longest) for run in runs])}
            for name, runs in groups.items()
        ],
        "settings": settings,
    }


def _groups(runs: Sequence[str], differing: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Runs that differ by their seeds alone, by a name that says what they differ in from others."""
    keys = [key for key in differing if key != _OF_A_SEED]
    found: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        # A run whose settings are not known is a group of its own.
        known = any(run in each and each[run] is not None for each in differing.values())
        found.setdefault(
            tuple(repr(differing[key].get(run)) for key in keys) if known or not keys else (run,), []
        ).append(run)
    named: dict[str, list[str]] = {}
    for members in found.values():
        few = [f"{key} = {differing[key].get(members[0])}" for key in keys[:_NAMED_BY]]
        name = ", ".join(few) if keys and len(keys) <= _NAMED_BY else members[0]
        named[name if name not in named else members[0]] = members
    return named


def _totals(name: str, shot: Mapping[str, Any]) -> dict[str, Any]:
    sites = shot["sites"]
    # Not the measures, which are of the latest rounds.
    shares = _known(_utilisation(site["ledger"]) for site in sites)
    parts = _known(_participation(row) for row in shot["timeline"]["rows"].values())
    times = _known(each for site in sites for each in site["curve"]["time"])
    return {
        "name": name,
        "verdict": shot["verdict"],
        "sites": len(sites),
        "step": max(_known(site["step"] for site in sites), default=None),
        "loss": _mean(site["loss"] for site in sites),
        "tokens": _total(site["tokens"] for site in sites),
        "rounds": max(_known(site["round"] for site in sites), default=None),
        "bytes_sent": _total(site["bytes_sent"] for site in sites),
        "utilisation": mean(shares) if shares else None,
        "participation": mean(parts) if parts else None,
        "seconds": max(times) - min(times) if times else None,
    }


def _utilisation(ledger: Mapping[str, Any]) -> float | None:
    """Share of the time between a site's rounds in which inner steps did not stand still."""
    stalled = elapsed = 0.0
    for before, after, seconds in zip(ledger["time"], ledger["time"][1:], ledger["stalled"][1:], strict=False):
        if None not in (before, after, seconds):
            stalled, elapsed = stalled + seconds, elapsed + after - before
    return max(0.0, 1 - stalled / elapsed) if elapsed > 0 else None


def _participation(row: str) -> float | None:
    """Share of the rounds since it joined in which a site contributed, by its row of the timeline."""
    known = [letter for letter in row if letter not in (LETTERS[Mark.BEFORE], LETTERS[Mark.UNKNOWN])]
    there = (LETTERS[Mark.CONTRIBUTED], LETTERS[Mark.RETRIED])
    return sum(letter in there for letter in known) / len(known) if known else None


def _run_curve(shot: Mapping[str, Any], longest: int) -> dict[str, list[float | None]]:
    """By bucket of steps: the mean loss of the sites, and what the whole run had come to by then."""
    start = min(_known(each for site in shot["sites"] for each in site["curve"]["time"]), default=0.0)
    buckets: list[list[dict[str, list[float]]]] = [[] for _ in range(_BUCKETS)]
    for site in shot["sites"]:
        own: list[dict[str, list[float]]] = [{key: [] for key in ("loss", *AXES)} for _ in range(_BUCKETS)]
        for values in zip(*(site["curve"][key] for key in ("loss", *AXES)), strict=True):
            place = min(_BUCKETS - 1, values[1] * _BUCKETS // (longest + 1))
            for key, value in zip(("loss", *AXES), values, strict=True):
                if value is not None:
                    own[place][key].append(value)
        for place, each in enumerate(own):
            buckets[place].append(each)
    join = {"step": _mean, "tokens": _total, "bytes_sent": _total, "time": _mean}
    curve: dict[str, list[float | None]] = {
        key: [join[key](_mean(site[key]) for site in sites) for sites in buckets] for key in AXES
    }
    curve["time"] = [None if each is None else each - start for each in curve["time"]]
    curve["loss"] = [_mean(_mean(site["loss"]) for site in sites) for sites in buckets]
    return curve


def _spread(curves: Sequence[Mapping[str, list[float | None]]]) -> dict[str, dict[str, list[float | None]]]:
    """Over the runs of a group, by axis."""
    losses = [_known(each["loss"][place] for each in curves) for place in range(_BUCKETS)]
    there = [place for place, values in enumerate(losses) if values]
    band = (
        {"low": [min(losses[each]) for each in there], "high": [max(losses[each]) for each in there]}
        if len(curves) > 1
        else {}
    )
    return {
        axis: {
            "x": [_mean(each[axis][place] for each in curves) for place in there],
            "mean": [mean(losses[place]) for place in there],
            **band,
        }
        for axis in AXES
    }


def _known(values: Iterable[Any]) -> list[Any]:
    return [each for each in values if each is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return mean(known) if known else None


def _total(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return sum(known) if known else None
