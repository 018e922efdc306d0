"""A round under way while the inner loop goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from titan_ext.semi_sync.round.round import Round


class Flight:
    """At most one round, on a thread of its own or already there, until its landing."""

    def __init__(self) -> None:
        self.land_at = 0
        """Inner step at which it lands."""
        self._round: Future[Round] | None = None
        self._pool: ThreadPoolExecutor | None = None

    @property
    def under_way(self) -> bool:
        """Whether there is a round that has not landed."""
        return self._round is not None

    def start(self, run: Callable[[], Round], land_at: int) -> None:
        """Let ``run`` exchange on the thread."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="titan_ext-exchange")
        self._round, self.land_at = self._pool.submit(run), land_at

    def hold(self, round_: Round, land_at: int) -> None:
        """Keep a round that has been exchanged."""
        self._round, self.land_at = Future(), land_at
        self._round.set_result(round_)

    def due(self, clock: int) -> bool:
        """Whether it has to land after inner step ``clock``."""
        return self.under_way and clock >= self.land_at

    def arrived(self) -> Round | None:
        """The round, once its exchange is over; it stays."""
        return self._round.result() if self._round is not None else None

    def land(self) -> Round:
        """The round, once its exchange is over; it is under way no more."""
        round_, self._round = self._round.result(), None
        return round_

    def forget(self) -> None:
        """Drop a held round."""
        self._round = None

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
