"""``metrics.jsonl`` and ``summary.json`` of a site."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any


class RunJournal:
    """Appends lines to ``metrics.jsonl`` and writes ``summary.json`` at the end.

    Args:
        folder: the site's dump folder.
        enabled: False on all ranks but the one that logs; the methods then do nothing.
    """

    def __init__(self, folder: str, *, enabled: bool) -> None:
        self._folder = Path(folder)
        self._file = None
        if enabled:
            self._folder.mkdir(parents=True, exist_ok=True)
            # A summary speaks of the run that ended; this one has not.
            (self._folder / "summary.json").unlink(missing_ok=True)
            self._file = open(self._folder / "metrics.jsonl", "a", encoding="utf-8")

    def add(self, kind: str, values: dict[str, Any]) -> None:
        """Append one line of the given kind; complete when this returns."""
        if self._file is not None:
            self._file.write(_to_json({"kind": kind, **values, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()

    def summarize(self, values: dict[str, Any]) -> None:
        """Write ``summary.json``, whole or not at all."""
        if self._file is not None:
            partial = self._folder / "summary.json.partial"
            partial.write_text(_to_json(values, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, self._folder / "summary.json")

    def close(self) -> None:
        """Close the file; further lines are dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _to_json(values: dict[str, Any], indent: int | None = None) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(finite, indent=indent, allow_nan=False)
