"""The last quorum, over whose connections a round may be exchanged before the lighthouse has told who takes part in it."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.futures import Future

from titan_ext.replica.streams.connections import Connections
from titan_ext.semi_sync.wire.manager import ReduceOperation


class SitesOfLastQuorum:
    """A ``StandingQuorum``. Its messages fail once another quorum has come, whose connections are new.

    Args:
        connections: of the quorum.
        sites: in it.
        rank: of this site among them.
        stands: whether the manager's quorum is this one still.
    """

    def __init__(self, connections: Connections, sites: int, rank: int, stands: Callable[[], bool]) -> None:
        self._connections, self._sites, self._rank, self._stands = connections, sites, rank, stands
        self._error: Exception | None = None

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

    def close(self, error: Exception) -> None:
        """Let whatever waits for a message fail."""
        self._connections.close(error)


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

    def get_future(self) -> Future:
        raise NotImplementedError
