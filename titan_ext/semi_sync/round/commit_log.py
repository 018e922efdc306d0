"""``commits.jsonl``: every commit a site has taken part in, on disk before the next inner step."""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from titan_ext.files import append_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One line of the log."""

    run: str
    """Hexadecimal name of the run."""
    generation: int
    round: int
    """Commits of the run so far, this one included."""
    step: int
    """Inner step of the launch."""
    contributors: Sequence[str]
    """Sites whose values were averaged."""
    sites: Sequence[str]
    """Sites of the quorum."""
    tokens: int
    """What the contributors have trained on since their last commit, all together."""
    digest: str | None
    """Checksum of shared parameters and outer optimizer state; equal at all sites. None where a method has none."""
    group_digests: Mapping[str, str] = field(default_factory=dict)
    """By group key the checksum of what only the sites with this site's label share."""


class CommitLog:
    """Appends commits and remembers those of earlier processes.

    Args:
        path: the file; made with its folder at the first commit.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)

    def last(self, run: str) -> Commit | None:
        """The furthest commit of a run; a line that a crash cut short counts as not written."""
        commits = [commit for commit in self._read() if commit.run == run]
        return max(commits, key=lambda commit: (commit.generation, commit.round), default=None)

    def append(self, commit: Commit) -> None:
        """Write a commit through to the disk; a disk that takes no more is reported and training goes on."""
        values = asdict(commit)
        if not commit.group_digests:
            del values["group_digests"]
        try:
            append_line(self._path, json.dumps({**values, "time": round(time.time(), 3)}), sync=True)
        except OSError as error:
            logger.error("round %d is not in %s: %s", commit.round, self._path, error)

    def _read(self) -> list[Commit]:
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [commit for commit in map(_parse, lines) if commit is not None]


def _parse(line: bytes) -> Commit | None:
    try:
        values = json.loads(line)
        values.pop("time", None)
        return Commit(**values)
    except (ValueError, TypeError, AttributeError):
        return None
