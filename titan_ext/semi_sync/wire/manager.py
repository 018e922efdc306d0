"""The replica manager that the outer loop needs, one for each rank of a site."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup, ReduceOp, Work

ReduceOperation = ReduceOp | ReduceOp.RedOpType
"""``ReduceOp.SUM`` is the latter; torchft's signatures and torch's say the former."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentBytes:
    """What a rank has sent to the other sites so far, in bytes; 0 where it is not known."""

    frames: int = 0
    """Of all frames in rounds, headers and repetitions included."""
    control: int = 0
    """Of messages that carry no values: tables of statuses and weights."""
    healing: int = 0
    """Of the frames that gave other sites the shared state."""


class QuorumWire(Protocol):
    """What carries the messages of one rank to its like at the other sites of a quorum, and keeps their errors."""

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group of this rank and those it is paired with at the other sites, for collectives of bytes.

        None at a rank whose leader exchanges for it.
        """

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: ReduceOperation) -> Work:
        """Reduce ``tensor`` in place over the sites of the quorum; never raises."""

    def num_participants(self) -> int:
        """Sites in the quorum."""

    def participating_rank(self) -> int:
        """This site's place among them, from 0."""

    def report_error(self, error: Exception) -> None:
        """Keep an error."""

    def errored(self) -> object | None:
        """The error kept since the quorum, if any."""


class StandingQuorum(QuorumWire, Protocol):
    """The last quorum, over whose connections a round is exchanged while the next one is asked for.

    Its errors are its own: where the next quorum is another one, they say nothing of that.
    """

    def ask(self, now: Callable[[], float]) -> bool:
        """Ask for the next quorum, which the manager then has; ``now`` is what the wait is timed by.

        Returns:
            whether the round may be exchanged meanwhile; if not, the next quorum is there, and another one.
        """

    def wait(self) -> float:
        """Until the next quorum is there; returns when it came.

        Raises:
            UserError, RunError: there is none; see ``Replica.start_quorum``.
        """

    @property
    def stands(self) -> bool:
        """Whether the manager's quorum is this one still; equal at all ranks of the site."""

    def errored(self) -> Exception | None:
        """The first error."""


class ReplicaManager(QuorumWire, Protocol):
    """Membership, reduction over sites and the commit vote of one rank's replica group.

    One quorum is followed by any number of collectives and one vote. Errors of a collective are kept by the manager
    and turn the vote into a no. ``titan_ext.replica.Replica`` has all of it;
    ``compat.torchft_manager.adapt_manager`` gives a plain ``torchft.manager.Manager`` what it lacks.
    """

    @property
    def bytes_sent(self) -> SentBytes:
        """What this rank has sent to the other sites so far."""

    def start_quorum(self) -> None:
        """Agree on who takes part; a site that is behind has its state loaded before this returns."""

    def standing_quorum(self) -> StandingQuorum | None:
        """The last quorum, where its round was committed and the next one may be exchanged before its own is there."""

    def should_commit(self) -> bool:
        """The vote over the ranks of this site: true if every one of them was without error."""

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """Name the shared state that a site which is behind receives."""

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """Give the copy of the shared state that a site which is about to join has asked for, if one has.

        Args:
            make: the state; by default all that was registered.
        """

    def state_dict(self) -> dict[str, int]:
        """Counters that belong into a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore them."""


def wire_device(manager: QuorumWire) -> torch.device:
    """Where a message has to lie for the manager's process group.

    Gloo moves host memory; it takes an accelerator's tensors for an all-reduce alone. The groups of
    accelerators take nothing else than their own.
    """
    group = manager.process_group
    name = group.getBackendName() if group is not None else ""  # type: ignore[attr-defined]  # not in torch's stubs
    if any(backend in name for backend in ("nccl", "xccl")):
        return torch.device(torch.accelerator.current_accelerator())
    return torch.device("cpu")
