"""What came of a rehearsal in real time, from the files that its sites have left."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from titan_ext.instruments.lines import LineFollower, LocalFile
from titan_ext.instruments.places import EVENTS, METRICS, SUMMARY
from titan_ext.instruments.site import round_seconds
from titan_ext.lab.trace import Outcome, SiteTrace
from titan_ext.semi_sync.wire.ledger import RoundRecord

_ENDS = ("waiting", "failed", "stopped")
_FIELDS = {each.name for each in fields(RoundRecord)}


def read_outcome(
    folder: Path, sites: Sequence[str], began: float, sent: Sequence[int], until: float = float("inf")
) -> Outcome:
    """The outcome of a rehearsal.

    Args:
        folder: with a folder for each site.
        sites: their names.
        began: from when its seconds count, of ``time.time``.
        sent: bytes by site.
        until: seconds after which the sites were told to leave.
    """
    traces = []
    for name, size in zip(sites, sent, strict=True):
        trace = _trace(name, [*_lines(folder / name / METRICS), *_ends(folder / name)], began, until)
        trace.sent_bytes = size
        traces.append(trace)
    summaries = [_summary(folder / name / SUMMARY) for name in sites]
    for trace, summary in zip(traces, summaries, strict=True):
        if summary is None:
            trace.error = _last_word(folder / trace.name)
    ended = [summary for summary in summaries if summary is not None]
    return Outcome(
        sites=traces,
        seconds=max(trace.ended for trace in traces),
        finished=bool(ended),
        state_sha256=ended[0].get("shared_state_sha256") or "" if ended else "",
        clock="real",
    )


def _ends(folder: Path) -> list[dict[str, Any]]:
    """When the site's processes were gone, as the launcher has seen it."""
    return [{"kind": "end", "time": line["time"]} for line in _lines(folder / EVENTS) if line.get("phase") in _ENDS]


def _trace(name: str, lines: Sequence[dict[str, Any]], began: float, until: float) -> SiteTrace:
    trace = SiteTrace(name=name)
    stalled, is_there = 0.0, False
    for line in sorted(lines, key=lambda line: line["time"]):
        time = line["time"] - began
        if line["kind"] == "end":
            time = min(time, max(until, trace.ended))
            if not is_there:
                continue  # it had not begun
            # What it was in has no line: a step that is lost, or a round for whose others it waited.
            stalled, is_there = stalled + time - trace.ended, False
        if line["kind"] == "start":
            if trace.lives:
                trace.away_seconds += time - trace.ended
            else:
                trace.started = time
            trace.lives, is_there = trace.lives + 1, True
        elif line["kind"] == "step":
            trace.steps = max(trace.steps, line["step"])
        elif line["kind"] == "round":
            trace.rounds.append((time, RoundRecord(**{key: line[key] for key in line.keys() & _FIELDS})))
            stalled += round_seconds(line) or 0.0 if line.get("seconds_stalled") is None else line["seconds_stalled"]
            trace.steps = max(trace.steps, line["step"])
        trace.ended = time
    trace.training_seconds = max(0.0, trace.ended - trace.started - trace.away_seconds - stalled)
    return trace


def _last_word(folder: Path) -> str | None:
    """What the launcher said last of a site that has not come to its end."""
    said = [line for line in _lines(folder / EVENTS) if line.get("phase") != "stopped"]
    return str(said[-1].get("text")) if said and said[-1].get("phase") in ("failed", "waiting") else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return LineFollower(LocalFile(path)).poll()


def _summary(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
