"""A replica that gives up a quorum when the site leaves."""

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from titan_ext.replica import Replica
from titan_ext.replica.shutdown.graceful_shutdown import Departure


class LeavingReplica(Replica):
    """A ``Replica`` that asks for no quorum, and waits for none, once its site leaves.

    The round then fails as if the wire had broken: it was not committed and is pending.

    Args:
        departure: of the site.
        *args, **kwargs: as ``Replica``.
    """

    def __init__(self, *args: Any, departure: Departure, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._client = _Client(self._client, departure)

    def fall_silent(self) -> None:
        """Stop the heartbeats: the others go on without this site once the lighthouse misses them.

        torchft's lighthouse takes no farewell. Requests under way are still answered.
        """
        if self._manager is not None:
            self._manager.shutdown()

    def _async_quorum(self, *args: Any, **kwargs: Any) -> None:
        given_up = None
        try:
            super()._async_quorum(*args, **kwargs)
        except _QuorumGivenUp as error:
            given_up = error
        if given_up is not None:
            self.report_error(given_up)  # outside of the handler, whose traceback torchft would add


class _QuorumGivenUp(Exception):
    pass


class _Client:
    """torchft's client of the manager server, but for the quorum."""

    def __init__(self, client: Any, departure: Departure) -> None:
        self._client = client
        self._departure = departure
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="titan_ext-quorum")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _quorum(self, **request: Any) -> Any:
        if not self._departure.quorums.advance():
            raise _QuorumGivenUp("the site leaves")
        answer = self._asking.submit(self._client._quorum, **request)
        wait((answer, self._departure.answers.agreed), return_when=FIRST_COMPLETED)
        # Another rank of the site may have had the answer in time: then it comes here too.
        if not self._departure.answers.advance():
            raise _QuorumGivenUp("the site leaves")
        return answer.result()
