"""The sync plan: what a method exchanges, when, and how it is applied.

A method of the field is a table of rows. The engine reads nothing but the table, so two
methods never differ in code that touches the wire.
"""

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from titan_ext.semi_sync.state.synced_state import SyncedRow

PARAMETERS = "params"
"""The synced state that is the model's parameters; any other name is an optimizer state's key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncRow:
    """One synced state of one fragment, with its own place in the schedule.

    The row is launched after inner step ``t`` when ``t % period == offset % period`` and lands
    ``delay`` inner steps later, before anything is launched at that step.

    Raises:
        ValueError: a number is outside its range.
    """

    period: int
    """Inner steps between two launches (the papers' K or H)."""

    state: str = PARAMETERS
    """``params``, or the key of an optimizer state such as ``exp_avg``; of several with ``|`` between them a
    parameter's first counts."""

    required: Literal["all", "some", "none"] = "all"
    """Which trained parameters must have the state; those without are left out."""

    fragment: int = 0
    """Index of the fragment of the model that this row covers."""

    offset: int = 0
    """Inner step, modulo the period, after which the row is launched."""

    delay: int = 0
    """Inner steps between launch and landing (Streaming DiLoCo's tau)."""

    outer_optimizer: bool = False
    """False: the weighted mean of the values. True: the outer optimizer's step on the pseudo-gradient."""

    mixing: float = 0.0
    """Share of the local value kept at landing (Streaming DiLoCo's alpha); 0 takes the global one."""

    kind: "type[SyncedRow] | None" = None
    """What the row sends and how it takes what comes back, where that is a method's own; by default the
    mean of a state, or the global copy's step for parameters."""

    scope: str = ""
    """Name of the scope whose parameters it covers; empty for those of no other scope."""

    name: str | None = None
    """Told apart by this from another row of the same state and fragment."""

    retry: bool = True
    """After a round that was not committed: try again at the next inner step, or wait for the next launch."""

    final: bool = False
    """Launched once, after the last inner step, instead of by the period."""

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period = {self.period}: a sync period is at least 1 inner step")
        if not 0 <= self.delay <= self.period:
            raise ValueError(f"delay = {self.delay}: must lie between 0 and the period ({self.period})")
        if not 0.0 <= self.mixing <= 1.0:
            raise ValueError(f"mixing = {self.mixing}: must lie between 0 and 1")

    @property
    def key(self) -> str:
        """Name of the row in logs and checkpoints."""
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.name or self.state}/{self.fragment}"

    def due(self, clock: int) -> bool:
        """Whether the row is launched after inner step ``clock`` (1 for the first step)."""
        return clock > 0 and not self.final and (clock - self.offset) % self.period == 0


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """The rows of a method, in the order in which they travel.

    Raises:
        ValueError: two rows share a key, or one would be launched while another is in flight.
    """

    rows: tuple[SyncRow, ...]

    def __post_init__(self) -> None:
        keys = [row.key for row in self.rows]
        if len(set(keys)) != len(keys):
            raise ValueError(f"sync plan: two rows with one key among {keys}")
        scheduled = [row for row in self.rows if not row.final]
        for row in scheduled:
            for other in scheduled:
                _refuse_overlap(row, other)

    def due(self, clock: int) -> list[int]:
        """Indices of the rows to launch after inner step ``clock``."""
        return [index for index, row in enumerate(self.rows) if row.due(clock)]

    def final(self) -> list[int]:
        """Indices of the rows to launch after the last inner step."""
        return [index for index, row in enumerate(self.rows) if row.final]


def _refuse_overlap(row: SyncRow, other: SyncRow) -> None:
    """One round is in flight at a time: the commit vote is one per quorum.

    Launch times of two rows differ by every value congruent to the difference of their offsets
    modulo the greatest common divisor of their periods, so the smallest positive one decides.
    """
    divisor = gcd(row.period, other.period)
    apart = (other.offset - row.offset) % divisor
    if apart == 0 and row.delay != other.delay:
        raise ValueError(
            f"sync plan: rows {row.key} and {other.key} are launched together but land "
            f"{row.delay} and {other.delay} steps later"
        )
    if 0 < (apart or divisor) < row.delay:
        raise ValueError(
            f"sync plan: row {other.key} would be launched {apart or divisor} steps after row {row.key}, "
            f"which lands only after {row.delay}; lower the delay"
        )
