"""A quorum that is asked for on a thread of its own, while the round is exchanged over the connections of the last one."""

from concurrent.futures import Future
from threading import Thread

from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.wire.manager import ReplicaManager, StandingQuorum


class PendingQuorum:
    """The next quorum, from now on.

    Args:
        manager: is asked for it.
        last: fails where the next one fails, so that nobody waits there for sites that do not come.
        clock: what the wait is timed by.
    """

    def __init__(self, manager: ReplicaManager, last: StandingQuorum, clock: Clock) -> None:
        self._manager, self._last, self._clock = manager, last, clock
        self._arrived_at: Future[float] = Future()
        # A daemon: a process that ends meanwhile does not wait for the lighthouse.
        Thread(target=self._ask, daemon=True, name="titan_ext-quorum").start()

    def wait(self) -> float:
        """Until it is there; returns when that was, in the clock's seconds.

        Raises:
            UserError, RunError: there is none; see ``Replica.start_quorum``.
        """
        return self._arrived_at.result()

    def _ask(self) -> None:
        try:
            self._manager.start_quorum()
            self._arrived_at.set_result(self._clock.now())
        except BaseException as error:  # noqa: BLE001 — raised again where it is waited for
            self._last.close(RuntimeError(f"no quorum came: {error}"))
            self._arrived_at.set_exception(error)
