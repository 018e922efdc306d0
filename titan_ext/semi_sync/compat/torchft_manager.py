"""What a plain torchft manager lacks of ours. torchft's privates that the outer loop needs are here and nowhere else."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work

from titan_ext.semi_sync.wire.manager import ReduceOperation, ReplicaManager, SentBytes


def adapt_manager(manager: Any) -> ReplicaManager | None:
    """A manager of ours as it is, a plain ``torchft.manager.Manager`` wrapped; None stays None.

    Raises:
        ValueError: the manager was built with an asynchronous quorum or with spares.
    """
    if manager is None or hasattr(manager, "serve_snapshot_requests"):
        return manager
    return _TorchftManager(manager)


def manager_of_script(
    manager: Any, *, mock_arguments: Mapping[str, Any], mock_buckets: bool = False
) -> "ScriptManager":
    """A manager whose quorums are asked for outside of the outer loop; one without a process group counts as a mock.

    Args:
        manager: of a script for torchft's classes.
        mock_arguments: what torchft's class gives a mock's all-reduce beside the tensor.
        mock_buckets: whether it gives a mock buckets instead of one tensor after the other.

    Raises:
        ValueError: as of ``adapt_manager``.
    """
    if isinstance(getattr(manager, "_pg", None), ProcessGroup):
        return ScriptManager(manager)
    return _MockManager(manager, mock_arguments, mock_buckets)


class _TorchftManager:
    """A ``torchft.manager.Manager`` with all that a ``ReplicaManager`` has; everything else is torchft's.

    Args:
        manager: built with ``use_async_quorum=False``.

    Raises:
        ValueError: it was not, or it was built with spares.
    """

    def __init__(self, manager: Any) -> None:
        if getattr(manager, "_use_async_quorum", False) is True:
            raise ValueError("the quorum has to be synchronous: build the manager with use_async_quorum=False")
        if getattr(getattr(manager, "_replica_world_size_mode", None), "name", "") == "FIXED_WITH_SPARES":
            raise ValueError(
                "a spare would have no place: build the manager with world_size_mode=WorldSizeMode.DYNAMIC"
            )
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    @property
    def process_group(self) -> ProcessGroup | None:
        """torchft offers all-reduce alone; the collectives of bytes go to its group."""
        return self._manager._pg

    @property
    def bytes_sent(self) -> SentBytes:
        """Unknown, but where the group is one of ours."""
        group = self._manager._pg
        return SentBytes(frames=getattr(group, "bytes_sent", 0), control=getattr(group, "control_bytes_sent", 0))

    def standing_quorum(self) -> None:
        """None: another process may not have come to the same round yet, and torchft's groups wait for no quorum."""

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """Nothing: torchft gives a copy of the state only within a quorum."""


class ScriptManager(_TorchftManager):
    """A torchft manager that has had its quorum when a round begins."""

    def start_quorum(self) -> None:
        """Nothing: which fragment is due depends on the quorum, so it came first."""

    @property
    def commits(self) -> int:
        """torchft's step."""
        return self._manager.current_step()

    def announce(self, shapes: Sequence[torch.Size]) -> None:
        """The shapes of the tensors that are reduced next, in one flat one."""

    def loads_more_than(self, keys: Collection[str]) -> bool:
        """Whether a peer's state is more than that of ``keys``: the script registered a model of its own."""
        return any(key not in keys for key in self._manager._load_state_dict_fns)


class _MockManager(ScriptManager):
    """What a test puts in a manager's place, such as ``create_autospec(Manager)``: a site alone.

    What it answers where a number or an error is asked for may be neither, unless the test said so.
    """

    def __init__(self, manager: Any, arguments: Mapping[str, Any], buckets: bool) -> None:
        super().__init__(manager)
        self._arguments = arguments
        self._buckets = buckets
        self._shapes: Sequence[torch.Size] = ()

    @property
    def process_group(self) -> None:
        """None."""

    @property
    def bytes_sent(self) -> SentBytes:
        """None: there is no wire."""
        return SentBytes()

    @property
    def commits(self) -> int:
        step = self._manager.current_step()
        return step if isinstance(step, int) else 0

    def announce(self, shapes: Sequence[torch.Size]) -> None:
        self._shapes = () if self._buckets else shapes

    def num_participants(self) -> int:
        """This site alone."""
        return 1

    def participating_rank(self) -> int:
        """The first place."""
        return 0

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: ReduceOperation) -> Work:
        """As torchft's classes call it: tensor by tensor, for their mean."""
        sizes = [shape.numel() for shape in self._shapes]
        if sum(sizes) != tensor.numel():
            return self._manager.allreduce(tensor, **self._arguments)
        for part, shape in zip(tensor.split(sizes), self._shapes, strict=True):
            work = self._manager.allreduce(part.view(shape), **self._arguments)
            work.wait()
        return work

    def errored(self) -> Exception | None:
        """What the test says, if that is an error."""
        error = self._manager.errored()
        return error if isinstance(error, Exception) else None
