"""Every private part of torchft 0.2.0 that a site's membership needs, each with its reason, under public names.

Nothing else in ``titan_ext.replica`` touches a name of torchft's that begins with "_", so this is the file to
read when torchft changes.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from torch.distributed import ProcessGroup, TCPStore
from torchft._torchft import QuorumResult  # torchft.coordination exports the client, but not the type of its answer
from torchft.coordination import ManagerClient
from torchft.manager import Manager

__all__ = [
    "GROUP_KEYS",
    "OpenManager",
    "QuorumAbandoned",
    "QuorumClient",
    "QuorumResult",
    "state_address",
    "state_step",
]

GROUP_KEYS = "torchft/"
"""Prefix of the keys of a site's store under which the ranks of a quorum find each other (``Manager._async_quorum``).
torchft never deletes them."""


class QuorumClient(Protocol):
    """What a manager asks of its site's manager server."""

    def quorum(
        self, *, group_rank: int, step: int, timeout: timedelta, init_sync: bool, **request: Any
    ) -> QuorumResult:
        """Wait for the next quorum."""

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        """The vote of the site's ranks."""


Client = TypeVar("Client", bound=QuorumClient)


class QuorumAbandoned(Exception):
    """Raised by a ``QuorumClient`` that gives up a quorum; the manager keeps it as the round's error."""


class OpenManager(Manager):
    """torchft's manager with the private parts that ``Replica`` needs under public names.

    Args:
        **options: as ``torchft.manager.Manager``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._quorum_client: QuorumClient = _PublicClient(self._client)

    @property
    def process_group(self) -> ProcessGroup:
        """The group of this rank and those it is paired with; torchft offers all-reduce alone, bytes need the group."""
        return self._pg

    def abort_group(self) -> None:
        """End the collectives of the current group, without an error of the manager; torch's own takes no ``errored``."""
        self._pg.abort(errored=False)

    @property
    def site_store(self) -> TCPStore:
        """The store that the ranks of the site share; another connection to it would be one more to lose."""
        return self._store

    @property
    def quorum_id(self) -> int:
        """Number of the current group: a change means that torchft has built a new one."""
        return self._quorum_id

    def server_address(self) -> str:
        """URL of the site's manager server, for the other sites; rank 0 only."""
        return self._manager.address()

    def registered_state(self) -> dict[str, Any]:
        """All that was registered and the manager's own counters, as ``send_checkpoint`` would be given them."""
        return self._manager_state_dict()

    def wrap_quorum_client(self, wrap: Callable[[QuorumClient], Client]) -> Client:
        """Put a client of ours before the present one; torchft takes none as an argument."""
        client = wrap(self._quorum_client)
        self._quorum_client, self._client = client, _PrivateClient(client)
        return client

    def forget_failed_quorum(self) -> None:
        """torchft would raise the failure of the last quorum again at the next one."""
        self._quorum_future = None

    def stop_heartbeats(self) -> None:
        """The other sites go on without this one once the lighthouse misses its heartbeats.

        torchft's lighthouse takes no farewell. The server still answers requests under way. Only rank 0 has one.
        """
        if self._manager is not None:
            self._manager.shutdown()

    def _async_quorum(self, *args: Any, **kwargs: Any) -> None:
        # Raising would fail start_quorum; kept as an error it fails the round's vote alone.
        abandoned = None
        try:
            super()._async_quorum(*args, **kwargs)
        except QuorumAbandoned as error:
            abandoned = error
        if abandoned is not None:
            self.report_error(abandoned)  # outside of the handler, whose traceback torchft would add


def state_step(state: dict[str, Any]) -> int:
    """The torchft step of a state that ``OpenManager.registered_state`` gave."""
    return state["torchft"]["step"]


def state_address(manager_address: str, rank: int, timeout: timedelta) -> str:
    """The address at which a rank of another site serves state; a public call would need a quorum first.

    Raises:
        RuntimeError, OSError: that site's manager server does not answer.
    """
    client = ManagerClient(manager_address, connect_timeout=timeout)
    return client._checkpoint_metadata(rank, timeout=timeout)


class _PublicClient:
    """torchft's ``ManagerClient`` as a ``QuorumClient``; its ``_quorum`` has no public name."""

    def __init__(self, client: ManagerClient) -> None:
        self._client = client

    def quorum(self, **request: Any) -> QuorumResult:
        return self._client._quorum(**request)

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        return self._client.should_commit(group_rank, step, should_commit, timeout=timeout)


class _PrivateClient:
    """A ``QuorumClient`` as what torchft's manager calls."""

    def __init__(self, client: QuorumClient) -> None:
        self._quorum = client.quorum
        self.should_commit = client.should_commit
