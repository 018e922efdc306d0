"""The last quorum, over whose connections a round may be exchanged before the lighthouse has told who takes part in it."""

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
from torch.distributed import Work

from titan_ext.replica.streams.connections import Connections
from titan_ext.semi_sync.wire.manager import ReduceOperation


class SitesOfLastQuorum:
    """A ``StandingQuorum``. Its messages fail once another quorum has come, whose connections are new.

    Args:
        connections: of the quorum.
        sites: in it.
        rank: of this site among them.
        start_quorum: the manager's; waits for the next one.
        stands: whether the manager's quorum is this one still.
    """

    def __init__(
        self,
        connections: Connections,
        sites: int,
        rank: int,
        start_quorum: Callable[[], None],
        stands: Callable[[], bool],
    ) -> None:
        self._connections, self._sites, self._rank = connections, sites, rank
        self._start_quorum, self._stands = start_quorum, stands
        self._came_at: Future[float] = Future()
        self._error: Exception | None = None

    def ask(self, now: Callable[[], float]) -> bool:
        """Ask for the next quorum on a thread of its own; the round may be exchanged meanwhile."""
        # A daemon: a process that ends meanwhile does not wait for the lighthouse.
        Thread(target=self._ask, args=(now,), daemon=True, name="titan_ext-quorum").start()
        return True

    def wait(self) -> float:
        """Until it is there; returns when it came, or raises what ``Replica.start_quorum`` has raised."""
        return self._came_at.result()

    def _ask(self, now: Callable[[], float]) -> None:
        try:
            self._start_quorum()
            self._came_at.set_result(now())
        except BaseException as error:  # noqa: BLE001 — raised again where it is waited for
            # Nobody is to wait for the messages of sites that do not come.
            self._connections.close(RuntimeError(f"no quorum came: {error}"))
            self._came_at.set_exception(error)

    @property
    def process_group(self) -> Any:
        """What carries the messages."""
        return self._connections

    @property
    def stands(self) -> bool:
        """Whether the manager's quorum is this one still."""
        return self._stands()

    def num_participants(self) -> int:
        """Sites in the quorum."""
        return self._sites

    def participating_rank(self) -> int:
        """This site's place among them."""
        return self._rank

    def report_error(self, error: Exception) -> None:
        """Keep the first one."""
        self._error = self._error or error

    def errored(self) -> Exception | None:
        """The error kept."""
        return self._error

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: ReduceOperation) -> Work:
        """Sum ``tensor`` in place over the sites. Never raises: errors are kept."""
        try:
            return _Kept(self, self._connections.allreduce([tensor], reduce_op))
        except RuntimeError as error:
            self.report_error(error)
            return _Kept(self, None)


class _Kept(Work):
    """Work whose error is kept by the quorum; None failed before it began."""

    def __init__(self, quorum: SitesOfLastQuorum, work: Work | None) -> None:
        super().__init__()
        self._quorum, self._work = quorum, work

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                self._quorum.report_error(error)
        return True
