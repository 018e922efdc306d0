"""What a plain torchft manager lacks of ours. torchft's privates that the outer loop needs are here and nowhere else."""

from collections.abc import Callable
from typing import Any

from torch.distributed import ProcessGroup

from titan_ext.semi_sync.wire.manager import ReplicaManager


def adapt_manager(manager: Any) -> ReplicaManager | None:
    """A manager of ours as it is, a plain ``torchft.manager.Manager`` wrapped; None stays None."""
    if manager is None or hasattr(manager, "serve_snapshot_requests"):
        return manager
    return _TorchftManager(manager)


def quorum_is_asynchronous(manager: Any) -> bool:
    """Whether a torchft manager forms its quorum beside the training loop."""
    return bool(manager._use_async_quorum)


class _TorchftManager:
    """A ``torchft.manager.Manager`` with all that a ``ReplicaManager`` has; everything else is torchft's.

    Args:
        manager: built with ``use_async_quorum=False``.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    @property
    def process_group(self) -> ProcessGroup:
        """torchft offers all-reduce alone; the collectives of bytes go to its group."""
        return self._manager._pg

    @property
    def wire_bytes_sent(self) -> tuple[int, int]:
        """Unknown, but where the group is one of ours."""
        return getattr(self._manager._pg, "bytes_sent", 0), 0

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """Nothing: torchft gives a copy of the state only within a quorum."""
