"""Numbers that say how a site fares: what tables show and alerts compare. None is what is not known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import median
from typing import Any

from titan_ext.instruments.lines import number
from titan_ext.instruments.run import Run
from titan_ext.instruments.site import SiteHistory, round_seconds
from titan_ext.launcher.text import duration_text

LATEST_ROUNDS = 20
_LOSS_BEFORE, _LOSS_NOW = 200, 5
_PATIENT_STEPS = 3.0
_SILENT_STEPS = 10.0
_SILENT_SECONDS = 30.0


class State(StrEnum):
    """What a site does at the moment."""

    UNREADABLE = "unreadable"
    NO_DATA = "no data"
    STARTING = "starting"
    TRAINING = "training"
    WAITING = "waiting"
    """For the others, or for a result: its next round is due."""
    RESTARTING = "restarting"
    SILENT = "silent"
    LEFT = "left"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"


OVER = (State.LEFT, State.STOPPED, State.FAILED, State.FINISHED)
_PHASES = {"waiting": State.RESTARTING, "failed": State.FAILED, "stopped": State.STOPPED}


@dataclass(frozen=True, slots=True)
class Standing:
    """A site's state and a few words about it."""

    state: State
    text: str = ""


def standing(site: SiteHistory, now: float) -> Standing:
    """What the site does at the time ``now``, by what it and its launcher have written."""
    if not site.has_data:
        return Standing(State.UNREADABLE, site.problem) if site.problem else Standing(State.NO_DATA)
    if site.summary is not None:
        return Standing(State.FINISHED)
    phase, heard = site.phase, site.last_time
    if phase is not None and phase.kind in _PHASES and phase.time >= (heard or 0.0) - 1.0:
        return Standing(_PHASES[phase.kind], phase.text)
    if site.problem:
        return Standing(State.UNREADABLE, site.problem)
    latest = site.events[-1] if site.events else None
    if latest is not None and latest.kind == "left" and latest.time >= (heard or 0.0):
        return Standing(State.LEFT, latest.text)
    return _by_age(site, now)


def _by_age(site: SiteHistory, now: float) -> Standing:
    begun = max((each.time for each in site.events if each.kind in ("start", "running")), default=None)
    heard = max((each for each in (site.last_time, begun) if each is not None), default=None)
    if heard is None:
        return Standing(State.NO_DATA, "has written commits and nothing else")
    age, usual = now - heard, site.step_seconds or 1.0
    starting = begun is not None and begun >= (site.last_time or 0.0)
    every, last = site.setting("semi_sync", "sync_every"), site.last
    if not starting and every and last is not None and last.step % every == 0 and age > _PATIENT_STEPS * usual:
        return Standing(State.WAITING, f"in the round after step {last.step} for {duration_text(age)}")
    pauses = max((seconds for each in site.rounds.values() if (seconds := round_seconds(each))), default=0.0)
    if age > max(_SILENT_SECONDS, _SILENT_STEPS * usual + 2 * pauses) * (4 if starting else 1):
        return Standing(State.SILENT, f"has written nothing for {duration_text(age)}")
    if starting:
        ended = next((each.text for each in reversed(site.events) if each.kind == "waiting"), "")
        return Standing(State.STARTING, f"again: {ended}" if ended else "")
    return Standing(State.TRAINING)


# -- measures ------------------------------------------------------------------------------------------

Measure = Callable[[Run, SiteHistory, float], float | None]


def _loss_jump(run: Run, site: SiteHistory, now: float) -> float | None:
    losses = [each.loss for each in site.curve.recent if each.loss is not None]
    before, after = losses[:-_LOSS_NOW][-_LOSS_BEFORE:], losses[-_LOSS_NOW:]
    return median(after) / median(before) if len(before) >= _LOSS_NOW and median(before) > 0 else None


def _not_finite(run: Run, site: SiteHistory, now: float) -> float | None:
    count = 0
    for each in reversed(site.curve.recent):
        if each.is_finite:
            return float(count)
        count += 1
    return float(count) if count else None


def _rounds_missed(run: Run, site: SiteHistory, now: float) -> float | None:
    return float(run.missed_in_a_row(site.name)[0]) if run.rounds else None


def _participation(run: Run, site: SiteHistory, now: float) -> float | None:
    return run.participation(site.name, LATEST_ROUNDS)


def stall_of(site: SiteHistory, record: Mapping[str, Any]) -> float | None:
    """Seconds that inner steps stood still for a round; None where its line does not say so."""
    told = number(record.get("seconds_stalled"))
    # Without a delay nothing is hidden: they stood still for all of it.
    return told if told is not None or site.setting("semi_sync", "fragment_sync_delay") else round_seconds(record)


def _stall(run: Run, site: SiteHistory, now: float) -> float | None:
    rounds = list(site.rounds.values())[-LATEST_ROUNDS - 1 :]
    stalled = elapsed = 0.0
    for before, after in pairwise(rounds):
        seconds, times = stall_of(site, after), (number(before.get("time")), number(after.get("time")))
        if seconds is not None and None not in times:
            stalled, elapsed = stalled + seconds, elapsed + times[1] - times[0]
    return min(1.0, stalled / elapsed) if elapsed > 0 else None


def _silence(run: Run, site: SiteHistory, now: float) -> float | None:
    if site.last_time is None or standing(site, now).state in OVER:
        return None
    return max(0.0, now - site.last_time)


def _silent(run: Run, site: SiteHistory, now: float) -> float | None:
    return float(standing(site, now).state is State.SILENT) if site.has_data else None


def _waiting(run: Run, site: SiteHistory, now: float) -> float | None:
    if site.last_time is None:
        return None
    return now - site.last_time if standing(site, now).state is State.WAITING else 0.0


def _coming_back(run: Run, site: SiteHistory, now: float) -> float | None:
    stands = standing(site, now)
    again = stands.state is State.RESTARTING or (stands.state is State.STARTING and bool(stands.text))
    return float(again) if site.phase is not None else None


def _failed(run: Run, site: SiteHistory, now: float) -> float | None:
    return float(standing(site, now).state is State.FAILED) if site.has_data else None


def _unreadable(run: Run, site: SiteHistory, now: float) -> float | None:
    return float(site.problem is not None)


def _diverged(run: Run, site: SiteHistory, now: float) -> float | None:
    return float(site.name in run.diverged()) if site.commits else None


def _disk_free(run: Run, site: SiteHistory, now: float) -> float | None:
    if not site.disk or not site.disk.get("total"):
        return None
    return site.disk["free"] / site.disk["total"]


MEASURES: Mapping[str, tuple[Measure, str]] = {
    "loss_jump": (_loss_jump, "median loss of the last 5 steps by that of the 200 before, or as many as there are"),
    "not_finite_steps": (_not_finite, "latest steps one after the other whose loss was a NaN or an infinity"),
    "rounds_missed": (_rounds_missed, "latest rounds one after the other without the site's contribution"),
    "failed_rounds": (
        lambda run, site, now: float(site.failed_in_a_row) if site.has_data else None,
        "rounds of the site one after the other that were not committed",
    ),
    "participation": (_participation, f"share of the latest {LATEST_ROUNDS} rounds with the site's contribution"),
    "stall": (_stall, f"share of the time of the latest {LATEST_ROUNDS} rounds that inner steps stood still"),
    "silence_seconds": (_silence, "age of the site's last line; not where it has ended"),
    "silent": (_silent, "1 where a training site has written nothing for 10 of its steps, and 30 seconds at least"),
    "waiting_seconds": (_waiting, "how long the site has been in a round; 0 while it takes inner steps"),
    "coming_back": (_coming_back, "1 where the site's processes have ended and it does not train again yet"),
    "restarts": (
        lambda run, site, now: float(site.restarts) if site.phase is not None else None,
        "restarts of the site by its launcher",
    ),
    "failed": (_failed, "1 where the launcher has given the site up"),
    "unreadable": (_unreadable, "1 where the site's data cannot be read at the moment"),
    "diverged": (_diverged, "1 where the site's shared state differs from that of most after the same round"),
    "disk_free": (_disk_free, "share of the disk that is free where the site writes"),
}
"""Each with what it is, by name."""


def measure_all(run: Run, site: SiteHistory, now: float) -> dict[str, float | None]:
    """All measures of a site."""
    return {name: measure(run, site, now) for name, (measure, _) in MEASURES.items()}
