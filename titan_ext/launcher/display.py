"""What a launch shows while it runs: lines, or a live table in a terminal."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from titan_ext.launcher.text import (
    bytes_text,
    columns,
    ended_text,
    left_text,
    loss_text,
    number_text,
    round_seconds,
    round_text,
    step_text,
)


class Display(Protocol):
    """Where the progress of a run is shown."""

    def note(self, text: str) -> None:
        """Show a message once."""

    def state(self, site: str, short: str, sentence: str) -> None:
        """What the site does now: short for a table, a sentence for a line."""

    def record(self, site: str, record: Mapping[str, Any]) -> None:
        """A line of the site's ``metrics.jsonl``."""

    def refresh(self) -> None:
        """Show everything given so far."""


class LineDisplay:
    """One line for each step, round and note.

    Args:
        totals: name of the site -> steps of its run.
        out: the stream to write to.
    """

    def __init__(self, totals: Mapping[str, int], out: TextIO) -> None:
        self._totals = totals
        self._out = out
        self._width = max((len(name) for name in totals), default=0)

    def note(self, text: str) -> None:
        print(text, file=self._out)

    def state(self, site: str, short: str, sentence: str) -> None:
        print(f"{site:<{self._width}}  {sentence}", file=self._out)

    def record(self, site: str, record: Mapping[str, Any]) -> None:
        if record.get("kind") == "step":
            print(f"{site:<{self._width}}  {step_text(record, self._totals[site])}", file=self._out)
        elif record.get("kind") == "round":
            print(f"{site:<{self._width}}  {round_text(record)}", file=self._out)
        elif record.get("kind") == "left":
            print(f"{site:<{self._width}}  {left_text(record)}", file=self._out)
        elif record.get("kind") == "data_ended":
            print(f"{site:<{self._width}}  {ended_text(record)}", file=self._out)
        elif record.get("kind") == "note":
            print(f"{site:<{self._width}}  note: {record.get('text')}", file=self._out)

    def refresh(self) -> None:
        self._out.flush()


@dataclass(slots=True)
class _Row:
    state: str = "starting"
    step: Mapping[str, Any] | None = None
    round: Mapping[str, Any] | None = None
    sent: int = 0


class TableDisplay:
    """A table that is redrawn in place; notes scroll by above it.

    Args:
        totals: name of the site -> steps of its run.
        out: a terminal.
    """

    def __init__(self, totals: Mapping[str, int], out: TextIO) -> None:
        self._totals = totals
        self._out = out
        self._rows = {name: _Row() for name in totals}
        self._notes: list[str] = []
        self._shown: list[str] = []

    def note(self, text: str) -> None:
        self._notes += text.splitlines()

    def state(self, site: str, short: str, sentence: str) -> None:
        self._rows[site].state = short

    def record(self, site: str, record: Mapping[str, Any]) -> None:
        row = self._rows[site]
        if record.get("kind") == "step":
            row.step, row.state = record, "training"
        elif record.get("kind") == "round" and record.get("committed", True):
            row.round = record
            row.sent += record.get("bytes_sent") or 0
        elif record.get("kind") == "round":
            self.note(f"{site}: {round_text(record)}")
        elif record.get("kind") == "left":
            row.state = "left"
            self.note(f"{site}: {left_text(record)}")
        elif record.get("kind") == "data_ended":
            row.state = "data ended"
            self.note(f"{site}: {ended_text(record)}")
        elif record.get("kind") == "note":
            self.note(f"{site}: note: {record.get('text')}")

    def refresh(self) -> None:
        size = shutil.get_terminal_size()
        # Lines that wrap, or scroll out above, would be out of reach of the cursor when it goes back up.
        lines = [line[: size.columns - 1] for line in self._table()][: max(1, size.lines - 1)]
        if lines == self._shown and not self._notes:
            return
        back = f"\x1b[{len(self._shown)}F" if self._shown else ""
        text = "".join(f"{line}\x1b[K\n" for line in [*self._notes, *lines])
        self._out.write(f"{back}{text}\x1b[J")
        self._out.flush()
        self._shown, self._notes = lines, []

    def _table(self) -> list[str]:
        titles = ["site", "state", "step", "loss", "tokens/s", "lr", "round", "sites", "sent", "last round"]
        return columns([titles, *(self._cells(name, row) for name, row in self._rows.items())], left=2)

    def _cells(self, name: str, row: _Row) -> list[str]:
        step, last = row.step or {}, row.round or {}
        return [
            name,
            row.state,
            f"{step.get('step', 0)}/{self._totals[name]}",
            loss_text(step) if row.step else "-",
            number_text(step.get("tokens_per_second"), ",.0f"),
            number_text(step.get("lr"), ".2e"),
            number_text(last.get("round"), "d"),
            number_text(last.get("participants"), "d"),
            bytes_text(row.sent),
            f"{round_seconds(last):.2f} s" if row.round else "-",
        ]
