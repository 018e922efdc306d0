"""What is due, and what is still to be tried again."""

from collections.abc import Iterable

from titan_ext.semi_sync.plan.plan import SyncPlan


class Schedule:
    """The rows of a plan that wait for a round.

    Args:
        plan: the method's plan; rows are named by their place in it.
    """

    def __init__(self, plan: SyncPlan) -> None:
        self.pending: list[int] = []
        self._plan = plan
        self._finished = False
        self.not_before = 0
        """Inner step until which what waits may wait, unless more falls due."""

    def advance(self, clock: int) -> None:
        """Add what is due after inner step ``clock``."""
        due = self._plan.due(clock)
        if due:
            self.not_before = 0
        self.pending = _union(self.pending, due)

    def is_ready(self, clock: int) -> bool:
        """Whether a round is to see to what waits after inner step ``clock``."""
        return bool(self.pending) and clock >= self.not_before

    def finish(self, clock: int) -> bool:
        """Add what is due after the last inner step; whether a round is to see to it, or to what was put off."""
        rows = [] if self._finished else self._plan.final()
        self._finished = True
        put_off = bool(self.pending) and clock < self.not_before
        self.pending = _union(self.pending, rows)
        return bool(rows) or put_off

    def take(self) -> list[int]:
        """All that waits, which a round now sees to."""
        taken, self.pending = self.pending, []
        self.not_before = 0
        return taken

    def again(self, rows: Iterable[int]) -> None:
        """Try rows of a round that was not committed once more, those of a kind that does."""
        self.pending = _union([index for index in rows if self._plan.rows[index].retry], self.pending)

    def replace(self, rows: Iterable[int]) -> None:
        """Have wait what waits at a peer, should its round fail."""
        self.pending = []
        self.again(rows)

    def settle(self, rows: Iterable[int]) -> None:
        """Forget rows that a round has brought."""
        self.pending = [index for index in self.pending if index not in set(rows)]

    def beside(self, rows: Iterable[int] | None) -> list[int]:
        """``rows`` of a round under way, and all that waits."""
        return _union(list(rows or []), self.pending)

    def keys(self, rows: Iterable[int]) -> list[str]:
        """Keys of rows, which outlive a change of their order."""
        return [self._plan.rows[index].key for index in rows]

    def indices(self, keys: Iterable[str]) -> list[int]:
        """The inverse of ``keys``."""
        known = [row.key for row in self._plan.rows]
        return [known.index(key) for key in keys]


def _union(first: list[int], second: list[int]) -> list[int]:
    return first + [index for index in second if index not in first]
