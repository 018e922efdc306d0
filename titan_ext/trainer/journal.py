"""``metrics.jsonl`` and ``summary.json`` of a site."""

import json
import math
import time
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from titan_ext.files import append_line, write_whole


class RunJournal:
    """Appends lines to ``metrics.jsonl`` and writes ``summary.json`` at the end.

    Args:
        folder: the site's dump folder.
        enabled: False on all ranks but the one that logs; the methods then do nothing.
    """

    def __init__(self, folder: str, *, enabled: bool) -> None:
        self._folder = Path(folder)
        self._enabled = enabled
        self._lost, self._begun = 0, False
        if enabled:
            self._folder.mkdir(parents=True, exist_ok=True)
            # A summary speaks of the run that ended; this one has not.
            (self._folder / "summary.json").unlink(missing_ok=True)

    def add(self, kind: str, values: dict[str, Any]) -> None:
        """Append one line of the given kind, complete when this returns; a disk that takes no more is reported, and so
        is what was lost once it takes lines again."""
        if not self._enabled:
            return
        try:
            self._append(kind, values)
        except OSError as error:
            if not self._lost:
                logger.error("%s: cannot be written: %s; training goes on", error.filename, error.strerror)
            self._lost += 1

    def _append(self, kind: str, values: dict[str, Any]) -> None:
        path, now = self._folder / "metrics.jsonl", round(time.time(), 3)
        note = f"{self._lost} lines are missing here: the file could not be written" if self._lost else ""
        if self._begun and not path.exists():
            note = f"{path} was moved or removed while the site trains: what came before is not here"
            logger.warning("%s", note)
        if note:
            append_line(path, _to_json({"kind": "note", "text": note, "time": now}))
            self._lost = 0
        append_line(path, _to_json({"kind": kind, **values, "time": now}))
        self._begun = True

    def summarize(self, values: dict[str, Any]) -> None:
        """Write ``summary.json``, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        if self._enabled:
            write_whole(self._folder / "summary.json", _to_json(values, indent=2) + "\n")


def _to_json(values: dict[str, Any], indent: int | None = None) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(finite, indent=indent, allow_nan=False)
