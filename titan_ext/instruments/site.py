"""What one site has told of itself, in the order in which it was written."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from titan_ext.instruments.curve import Curve, Point, point
from titan_ext.instruments.lines import number

BYTES = ("bytes_sent", "bytes_received", "control_bytes_sent", "wire_bytes_sent", "healing_bytes_sent")
_MOST_ROUNDS = 3000
_MOST_EVENTS = 500
_LEAST_GAP_SECONDS = 5.0
_GAP_FACTOR = 8.0
"""Steps that a site usually takes in the time after which its silence is a gap."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a site beside steps and rounds."""

    time: float
    kind: str
    """Of the line: ``start``, ``left``, ``data_ended``, ``note``, ``not_finite``; ``silence``; or a phase of the launcher's."""
    text: str
    until: float | None = None
    """When it was over, where it lasted."""


@dataclass(slots=True)
class SiteHistory:
    """A site of a run, folded from its lines; nothing in it is a guess.

    Args:
        name: of the site.
    """

    name: str
    curve: Curve = field(default_factory=Curve)
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Committed rounds by their number: the line of ``metrics.jsonl``, with all the fields that it has."""
    commits: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The same rounds in ``commits.jsonl``."""
    failures: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))
    """Lines of rounds that were not committed."""
    failed_in_a_row: int = 0
    """Rounds that were not committed since the last that was."""
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=_MOST_EVENTS))
    validation: list[tuple[int, float | None]] = field(default_factory=list)
    """Step and loss."""
    config: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    disk: dict[str, float] | None = None
    """Bytes ``free`` and ``total`` where the site writes."""
    problem: str | None = None
    """Why nothing can be read of it at the moment."""
    bytes: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(BYTES))
    """Sums over its rounds, by the ledger's names."""
    first_time: float | None = None
    last_time: float | None = None
    """Of its latest line of ``metrics.jsonl``."""
    phase: Event | None = None
    """What its launcher said last."""
    restarts: int = 0
    _intervals: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    @property
    def has_data(self) -> bool:
        """Whether any line of it has been read."""
        return self.last_time is not None or bool(self.commits) or self.phase is not None

    @property
    def last(self) -> Point | None:
        """Its latest step."""
        return self.curve.last

    @property
    def last_round(self) -> dict[str, Any] | None:
        """The line of its latest committed round."""
        return self.rounds[max(self.rounds)] if self.rounds else None

    @property
    def step_seconds(self) -> float | None:
        """What an inner step usually takes from line to line."""
        return median(self._intervals) if self._intervals else None

    def setting(self, *keys: str) -> Any:
        """A value of the site's ``config.json``; None where it is not known."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def add_metrics(self, record: dict[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        time, kind = number(record.get("time")), record.get("kind")
        self._note_time(time, record)
        if kind == "step":
            self._add_step(record, time)
        elif kind == "round":
            self._add_round(record)
        elif kind == "validation":
            if isinstance(record.get("step"), int):
                self.validation.append((record["step"], number(record.get("loss"))))
        elif kind == "start":
            self._add_event(time, kind, "started")
        elif kind == "left":
            saved = "saved" if record.get("saved") else "not saved"
            self._add_event(time, kind, f"left as asked after step {record.get('step')}, which is {saved}")
        elif kind == "data_ended":
            self._add_event(time, kind, f"its data ended after step {record.get('step')}")
        elif kind == "note":
            self._add_event(time, kind, str(record.get("text")))

    def add_commit(self, record: dict[str, Any]) -> None:
        """A line of ``commits.jsonl``."""
        if isinstance(record.get("round"), int):
            _put(self.commits, record["round"], record)

    def add_event(self, record: dict[str, Any]) -> None:
        """A line that the launcher wrote about the site's process."""
        time = number(record.get("time"))
        self._add_event(time, str(record.get("phase")), str(record.get("text") or record.get("phase")))
        if time is not None:
            self.phase = self.events[-1]
        if record.get("phase") == "waiting":
            self.restarts += 1

    def _add_step(self, record: dict[str, Any], time: float | None) -> None:
        new = point(record, self.bytes["bytes_sent"])
        if new is None:
            return
        before = self.curve.last
        if before is not None and new.step <= before.step:
            self._add_event(time, "resumed", f"resumed after step {new.step - 1}, had reached {before.step}")
        if not new.is_finite and (before is None or before.is_finite):
            self._add_event(time, "not_finite", f"the loss of step {new.step} was not finite")
        self.curve.add(new)

    def _add_round(self, record: dict[str, Any]) -> None:
        self.bytes = {key: _plus(total, record.get(key)) for key, total in self.bytes.items()}
        if not record.get("committed", True) or not isinstance(record.get("round"), int):
            self.failures.append(record)
            self.failed_in_a_row += 1
            return
        self.failed_in_a_row = 0
        if record.get("level") == "region":  # no commit of the run
            return
        _put(self.rounds, record["round"], record)

    def _note_time(self, time: float | None, record: Mapping[str, Any]) -> None:
        if time is None:
            return
        if self.last_time is not None and record.get("kind") != "start":
            self._note_interval(self.last_time, time, record)
        self.first_time = time if self.first_time is None else self.first_time
        self.last_time = time

    def _note_interval(self, before: float, now: float, record: Mapping[str, Any]) -> None:
        usual, seconds = self.step_seconds, now - before - (round_seconds(record) or 0.0)
        if usual is not None and seconds > max(_LEAST_GAP_SECONDS, _GAP_FACTOR * usual):
            self.events.append(Event(before, "silence", f"wrote nothing for {seconds:.0f} s", until=now))
        elif record.get("kind") == "step":
            self._intervals.append(seconds)

    def _add_event(self, time: float | None, kind: str, text: str) -> None:
        if time is not None:
            self.events.append(Event(time, kind, text))


def round_seconds(record: Mapping[str, Any]) -> float | None:
    """Seconds from the quorum to the applied result of a round; None where its line has none of them."""
    parts = [number(record.get(f"seconds_{part}")) for part in ("quorum", "reduce", "apply")]
    return None if parts == [None] * 3 else sum(each or 0.0 for each in parts)


def _put(rounds: dict[int, dict[str, Any]], place: int, record: dict[str, Any]) -> None:
    """Keep a round; those from there on are of a time before the run went back to older checkpoints."""
    while rounds and next(reversed(rounds)) >= place:
        rounds.popitem()
    rounds[place] = record
    while len(rounds) > _MOST_ROUNDS:
        del rounds[next(iter(rounds))]


def _plus(total: int | None, more: Any) -> int | None:
    more = number(more)
    return total if more is None else (total or 0) + int(more)
