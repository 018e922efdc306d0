"""A replica that abandons its quorum when the site is asked to stop."""

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from titan_ext.replica import Replica
from titan_ext.replica.shutdown.graceful_shutdown import GracefulShutdown
from titan_ext.replica.torchft_internals import QuorumAbandoned, QuorumClient, QuorumResult


class StoppableReplica(Replica):
    """A ``Replica`` that asks for no quorum, and waits for none, once its site is asked to stop.

    The round then fails as if the wire had broken: it was not committed and is pending.

    Args:
        shutdown: of the site.
        *args, **kwargs: as ``Replica``.
    """

    def __init__(self, *args: Any, shutdown: GracefulShutdown, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_region: StoppableReplica | None = None
        """This rank's replica in the quorum of its region, which leaves with this one."""
        self.wrap_quorum_client(partial(_StoppableQuorumClient, shutdown))

    def stop_heartbeats(self) -> None:
        """In both quorums, see ``OpenManager``."""
        super().stop_heartbeats()
        if self.in_region is not None:
            self.in_region.stop_heartbeats()

    def shutdown(self, wait: bool = True) -> None:
        """Release everything of both."""
        super().shutdown(wait)
        if self.in_region is not None:
            self.in_region.shutdown(wait)


class _StoppableQuorumClient:
    """A ``QuorumClient`` that abandons a quorum at the count on which the ranks of the site have agreed."""

    def __init__(self, shutdown: GracefulShutdown, client: QuorumClient) -> None:
        self._shutdown = shutdown
        self._client = client
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="titan_ext-quorum")
        self.should_commit = client.should_commit

    def quorum(self, **request: Any) -> QuorumResult:
        if not self._shutdown.quorums.advance():
            raise QuorumAbandoned("the site leaves")
        # On another thread, since torchft's call cannot be interrupted; an abandoned one ends with the process.
        answer = self._executor.submit(self._client.quorum, **request)
        wait((answer, self._shutdown.answers.agreed), return_when=FIRST_COMPLETED)
        # Another rank of the site may have had the answer in time: then it comes here too.
        if not self._shutdown.answers.advance():
            raise QuorumAbandoned("the site leaves")
        return answer.result()
