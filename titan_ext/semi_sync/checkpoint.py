"""The outer loop in a distributed checkpoint."""

import json
from collections.abc import Mapping
from typing import Any

from titan_ext.semi_sync.build import Parts
from titan_ext.semi_sync.round.round import Round, flight_state


class Saving:
    """Gathers what the parts of the outer loop know, and gives it back to them.

    Args:
        parts: of this rank's outer loop.
    """

    def __init__(self, parts: Parts) -> None:
        self._rows = parts.rows
        self._progress = parts.progress
        self._lineage = parts.lineage
        self._schedule = parts.schedule
        self._flight = parts.flight
        self._residuals = parts.exchange.residuals
        self._manager = parts.manager
        self._device = parts.device

    def save(self, unsettled: list[int]) -> dict[str, Any]:
        """Everything, with global shapes.

        A round in flight is waited for and saved as its reduced buffer, so that it lands after a
        resume exactly as it would have.

        Args:
            unsettled: rows to be tried again after a resume if no round is in flight.
        """
        flight = self._arrived_flight()
        counters = {
            "clock": self._progress.clock,
            "lineage": self._lineage.state_dict(),
            "tokens": self._progress.tokens,
            "pending": self._schedule.keys(self._schedule.pending if flight else unsettled),
            "not_before": self._schedule.not_before,
            "flight": None if flight is None else {"land_at": self._flight.land_at, **flight.describe(self._rows)},
            "manager": self._manager.state_dict(),
        }
        return {
            "counters": json.dumps(counters),
            "rows": {row.row.key: row.checkpoint_state() for row in self._rows},
            "flight": flight_state(flight, self._rows),
            "residuals": self._residuals.checkpoint_state(flight),
        }

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``save`` returned."""
        counters = json.loads(state_dict["counters"])
        self._progress.clock, self._progress.tokens = counters["clock"], counters["tokens"]
        self._lineage.load_state_dict(counters["lineage"])
        self._schedule.pending = self._schedule.indices(counters["pending"])
        self._schedule.not_before = counters.get("not_before", 0)
        self._manager.load_state_dict(counters["manager"])
        for row in self._rows:
            row.load_checkpoint_state(state_dict["rows"].get(row.row.key, {}))
        self._residuals.load_checkpoint_state(state_dict.get("residuals", {}))
        flight = counters["flight"]
        if flight is not None:
            round_ = Round.restored(flight, state_dict["flight"], self._rows, self._device)
            self._progress.launch_clock = round_.clock
            self._flight.hold(round_, flight["land_at"])

    def _arrived_flight(self) -> Round | None:
        """The round in flight once its reduction is complete; None if there is none or it failed."""
        round_ = self._flight.arrived()
        if round_ is None:
            return None
        return round_ if round_.problem is None and self._manager.errored() is None and round_.rows else None
