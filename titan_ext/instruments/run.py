"""All sites of a run side by side: who took part in which round, and why another did not."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from titan_ext.instruments.lines import number
from titan_ext.instruments.site import Event, SiteHistory


class Mark(StrEnum):
    """What a site was in a round."""

    CONTRIBUTED = "contributed"
    RETRIED = "retried"
    """It contributed after attempts that were not committed."""
    JOINED = "joined"
    """It took over the others' state and contributed nothing yet."""
    LEFT_OUT = "left out"
    """It took part, and its work did not count."""
    ABSENT = "absent"
    BEFORE = "before"
    """It had not joined the run."""
    UNKNOWN = "unknown"
    """Nobody whose data is at hand has told."""


MISSED = (Mark.ABSENT, Mark.LEFT_OUT)


@dataclass(frozen=True, slots=True)
class Cell:
    """One site in one round."""

    mark: Mark
    reason: str = ""
    """Why it is not ``CONTRIBUTED``."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rounds one after the other in which a site was the same thing for the same reason."""

    site: str
    first: int
    last: int
    cell: Cell
    time: float | None
    """When the first of them was committed."""


@dataclass(slots=True)
class RoundFacts:
    """A committed round as all who tell of it have seen it."""

    number: int
    step: int | None = None
    time: float | None = None
    contributors: set[str] | None = None
    """None where nobody has told."""
    quorum: set[str] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Site to the reason that the outer loop gave."""


class Run:
    """The sites of a run.

    Args:
        name: for a title.
        sites: by name; those of which only others tell are added.
    """

    def __init__(self, name: str, sites: Mapping[str, SiteHistory]) -> None:
        self.name = name
        self.sites = dict(sites)
        self.rounds = _facts(self.sites.values())
        """By rising number."""
        for told in {
            each for facts in self.rounds.values() for each in (facts.contributors or set()) | set(facts.quorum or ())
        }:
            if not told.startswith("#"):
                self.sites.setdefault(told, SiteHistory(told))
        self._timelines: dict[str, dict[int, Cell]] = {}

    @property
    def names(self) -> list[str]:
        """Of the sites, sorted."""
        return sorted(self.sites)

    def timeline(self, site: str) -> dict[int, Cell]:
        """What the site was in each round."""
        if site not in self._timelines:
            self._timelines[site] = _timeline(self.sites[site], self.rounds)
        return self._timelines[site]

    def stretches(self, site: str) -> list[Stretch]:
        """The rounds in which the site did not simply contribute, neighbours of one kind as one."""
        found: list[Stretch] = []
        numbers = list(self.rounds)
        for place, number_ in enumerate(numbers):
            cell = self.timeline(site)[number_]
            if cell.mark in (Mark.CONTRIBUTED, Mark.BEFORE, Mark.UNKNOWN):
                continue
            before = found[-1] if found else None
            if before is not None and place and before.last == numbers[place - 1] and before.cell == cell:
                found[-1] = Stretch(site, before.first, number_, cell, before.time)
            else:
                found.append(Stretch(site, number_, number_, cell, self.rounds[number_].time))
        return found

    def missed_in_a_row(self, site: str) -> tuple[int, str]:
        """Rounds up to the latest one that the site has missed, and why."""
        cells = list(self.timeline(site).values())
        missed = 0
        while missed < len(cells) and cells[-1 - missed].mark in MISSED:
            missed += 1
        return missed, cells[-1].reason if missed else ""

    def participation(self, site: str, latest: int) -> float | None:
        """Share of the latest rounds, at most so many, in which the site contributed; None where it was in none yet."""
        known = [
            cell.mark
            for cell in list(self.timeline(site).values())[-latest:]
            if cell.mark not in (Mark.BEFORE, Mark.UNKNOWN)
        ]
        return sum(mark in (Mark.CONTRIBUTED, Mark.RETRIED) for mark in known) / len(known) if known else None

    def diverged(self) -> dict[str, int]:
        """Sites whose shared state differs from that of most after the latest round that several have recorded,
        and that round."""
        for number_ in reversed(self.rounds):
            sums = {
                name: each.commits[number_].get("digest")
                for name, each in self.sites.items()
                if number_ in each.commits and each.commits[number_].get("digest")
            }
            if len(sums) > 1:
                most, count = Counter(sums.values()).most_common(1)[0]
                right = most if count > 1 or len(set(sums.values())) == 1 else None
                return {name: number_ for name, each in sums.items() if each != right}
        return {}


def _facts(sites: Iterable[SiteHistory]) -> dict[int, RoundFacts]:
    found: dict[int, RoundFacts] = {}
    for site in sites:
        for records, quorum in ((site.rounds, None), (site.commits, "sites")):
            for place, record in records.items():
                facts = found.setdefault(place, RoundFacts(place))
                _learn(facts, record, record.get(quorum) if quorum else None)
    return dict(sorted(found.items()))


def _learn(facts: RoundFacts, record: Mapping[str, Any], quorum: Sequence[str] | None) -> None:
    time, contributors = number(record.get("time")), record.get("contributors")
    facts.step = record.get("step", facts.step) if facts.step is None else facts.step
    if time is not None:
        facts.time = time if facts.time is None else min(facts.time, time)
    if isinstance(contributors, list):
        facts.contributors = (facts.contributors or set()) | {str(each) for each in contributors}
    if isinstance(quorum, list):
        facts.quorum = (facts.quorum or set()) | {str(each) for each in quorum}
    if isinstance(record.get("missing"), Mapping):
        facts.missing |= {str(name): str(reason) for name, reason in record["missing"].items()}


def _timeline(site: SiteHistory, rounds: Mapping[int, RoundFacts]) -> dict[int, Cell]:
    cells: dict[int, Cell] = {}
    seen, since = False, float("-inf")
    for place, facts in rounds.items():
        taking_part = (
            place in site.rounds or site.name in (facts.quorum or ()) or site.name in (facts.contributors or ())
        )
        first, seen = not seen, seen or taking_part
        until = facts.time if facts.time is not None else float("inf")
        cells[place] = _cell(site, facts, taking_part, first=first and taking_part, seen=seen, since=since, until=until)
        if taking_part and facts.time is not None:
            since = facts.time
    return cells


def _cell(
    site: SiteHistory, facts: RoundFacts, taking_part: bool, *, first: bool, seen: bool, since: float, until: float
) -> Cell:
    told = facts.missing.get(site.name)
    if facts.contributors is None:
        return Cell(Mark.UNKNOWN, "nobody has told who contributed")
    if site.name in facts.contributors:
        failed = _failed_attempts(site, since, until)
        return Cell(Mark.RETRIED, failed) if failed else Cell(Mark.CONTRIBUTED)
    if taking_part:
        return _without_contribution(site, facts.number, told, first, since, until)
    if not seen:
        return Cell(Mark.BEFORE, "it had not joined yet")
    return Cell(Mark.ABSENT, why_absent(site, since, until) or told or "not in the quorum, and it has not said why")


def _without_contribution(
    site: SiteHistory, place: int, told: str | None, first: bool, since: float, until: float
) -> Cell:
    ended = _latest(site, ("data_ended",), float("-inf"), until)
    broken = _latest(site, ("not_finite",), since, until)
    if first or site.rounds.get(place, {}).get("healed"):
        why = why_absent(site, since, until)
        return Cell(Mark.JOINED, "took over the others' state" + (f" ({why})" if why and not first else ""))
    if broken is not None:
        return Cell(Mark.LEFT_OUT, f"{broken.text}, so its work was left out")
    if told is not None or ended is not None:
        return Cell(Mark.LEFT_OUT, told or ended.text)
    return Cell(Mark.LEFT_OUT, "in the quorum, but its work did not count")


def why_absent(site: SiteHistory, since: float, until: float) -> str | None:
    """What a site's own lines say of the time from ``since`` to ``until`` in which it was away; None for nothing."""
    if not site.has_data:
        return "not in the quorum; its own data is not at hand"
    event = _latest(site, ("failed", "waiting", "stopped", "left"), since, until)
    if event is not None:
        return event.text
    silences = [each for each in site.events if each.kind == "silence" and each.time < until and each.until > since]
    if silences:
        return f"{silences[-1].text}: hung, stopped or cut off"
    event = _latest(site, ("start", "resumed"), since, until)
    if event is not None:
        return f"its process was {event.text}" if event.kind == "start" else event.text
    failures = [each for each in site.failures if since < (number(each.get("time")) or 0.0) <= until]
    if failures:
        return str(failures[-1].get("error") or "its round was not committed")
    if site.last_time is not None and site.last_time <= until and site.summary is None:
        return "has written nothing since"
    return None


def _failed_attempts(site: SiteHistory, since: float, until: float) -> str:
    found = [each for each in site.failures if since < (number(each.get("time")) or 0.0) <= until]
    count = "an attempt" if len(found) == 1 else f"{len(found)} attempts"
    return f"after {count} that failed: {found[-1].get('error') or 'no reason given'}" if found else ""


def _latest(site: SiteHistory, kinds: Sequence[str], since: float, until: float) -> Event | None:
    found = [each for each in site.events if each.kind in kinds and since < each.time <= until]
    return found[-1] if found else None
