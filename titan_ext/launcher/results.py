"""What the sites of a run write: metrics and a summary at the end, and whether their shared states are equal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_ext.instruments.lines import LineFollower, LocalFile
from titan_ext.launcher.text import bytes_text, columns, number_text

_DIGEST_CHARACTERS = 12


class JsonLinesFollower(LineFollower):
    """Follows a file of JSON lines; what is in it at the start belongs to an earlier run and is skipped."""

    def __init__(self, path: Path) -> None:
        file = LocalFile(path)
        super().__init__(file, *file.end())


class SummaryFile:
    """A site's ``summary.json``; one that was there before this run is ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp_at_start = self._stamp()

    def read(self) -> dict[str, Any] | None:
        """The summary that this run wrote, or None."""
        stamp = self._stamp()
        if stamp is None or stamp == self._stamp_at_start:
            return None
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def results_table(summaries: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """One line for each site below a line of titles; a site without a summary gets dashes."""
    titles = ["site", "final loss", "steps", "tokens", "rounds", "sent", "received", "seconds", "shared state"]
    rows = []
    for name, summary in summaries.items():
        found = summary or {}
        rows.append(
            [
                name,
                number_text(found.get("final_loss"), ".4f"),
                number_text(found.get("steps"), "d"),
                number_text(found.get("tokens"), ",d"),
                number_text(found.get("rounds"), "d"),
                bytes_text(found.get("bytes_sent")),
                bytes_text(found.get("bytes_received")),
                number_text(found.get("seconds"), ".1f"),
                (found.get("shared_state_sha256") or "-")[:_DIGEST_CHARACTERS],
            ]
        )
    return columns([titles, *rows])


def _not_covered(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """In words, what equal checksums say nothing of."""

    def named(key: str) -> str:
        return ", ".join(dict.fromkeys(name for summary in summaries for name in summary.get(key, ())))

    found = []
    if scopes := named("scopes_not_compared"):
        found.append(f"not compared, as sites hold different parts: scope {scopes}")
    if buffers := named("buffers_not_compared"):
        found.append(f"not compared, as each site keeps its own: buffer {buffers}")
    if steps := max((summary.get("steps_past_shared_state", 0) for summary in summaries), default=0):
        found.append(f"each site's own model has taken {steps} inner step{'s' * (steps > 1)} since")
    return found


def compare_shared_state(summaries: Mapping[str, Mapping[str, Any] | None], *, complete: bool) -> tuple[bool, str]:
    """Whether every site left the same shared state, and a sentence that says so.

    Args:
        summaries: name of the site -> its summary, None if it left none.
        complete: these are all sites of the run; else there may be no other to compare with.
    """
    missing = [name for name, summary in summaries.items() if summary is None]
    if missing:
        return False, f"no summary.json from {', '.join(missing)}"
    digests = {name: summary.get("shared_state_sha256") or "" for name, summary in summaries.items()}
    distinct = set(digests.values())
    if distinct == {""}:
        return True, "the sites shared no state"
    if len(distinct) > 1:
        return False, "the sites' shared state DIFFERS: " + ", ".join(
            f"{name} {digest[:_DIGEST_CHARACTERS] or 'none'}" for name, digest in digests.items()
        )
    digest = distinct.pop()
    rest = "".join(f"; {each}" for each in _not_covered([summary or {} for summary in summaries.values()]))
    if len(digests) > 1:
        return True, f"all {len(digests)} sites hold the same shared state, sha256 {digest}{rest}"
    rest += "" if complete else "; at every other site it must be the same"
    return True, f"shared state sha256 {digest}{rest}"
