"""A round under way while the inner loop goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from titan_ext.semi_sync.round.round import RoundResult


class InFlightRound:
    """At most one round, on a thread of its own or already exchanged, until it is applied.

    Hazard: while its thread runs, no other collective between the sites may be issued from this rank.
    """

    def __init__(self) -> None:
        self.apply_at = 0
        """Inner step at which it is to be applied."""
        self._round: Future[RoundResult] | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def under_way(self) -> bool:
        """Whether there is a round that has not been applied."""
        return self._round is not None

    def start(self, run: Callable[[], RoundResult], apply_at: int) -> None:
        """Let ``run`` exchange on the thread."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="titan_ext-exchange")
        self._round, self.apply_at = self._pool.submit(run), apply_at

    def keep(self, result: RoundResult, apply_at: int) -> None:
        """Keep a round that has been exchanged."""
        self._round, self.apply_at = Future(), apply_at
        self._round.set_result(result)

    def due(self, step: int) -> bool:
        """Whether it has to be applied after inner step ``step``."""
        return self.under_way and step >= self.apply_at

    def peek(self) -> RoundResult | None:
        """The round, once its exchange is over; it stays under way."""
        return self._round.result() if self._round is not None else None

    def wait(self) -> RoundResult:
        """The round, once its exchange is over; it is under way no more."""
        result, self._round = self._round.result(), None
        return result

    def forget(self) -> None:
        """Drop a kept round."""
        self._round = None

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
