"""Collectives of bytes between the sites of a quorum."""

from collections.abc import Callable, Sequence

import torch
from torch.distributed import ProcessGroup, Work
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device


class ByteCollectives:
    """Collectives of bytes between the sites; an error is reported to the manager and zeros arrive."""

    def __init__(self, manager: ReplicaManager) -> None:
        self._manager = manager
        self._device = wire_device(manager)
        self.sites = manager.num_participants()
        self.rank = manager.participating_rank() if self.sites > 1 else 0
        """Of this site among them."""

    def gather(self, message: torch.Tensor) -> tuple[torch.Tensor, Work | None]:
        """Every site's ``message [bytes]`` as ``[sites, bytes]``."""
        message = message.to(self._device)
        received = message.new_empty(self.sites, message.numel())
        if self.sites == 1:
            received[0] = message
            return received, None
        return received, self._issue(
            received,
            lambda group: group.allgather([list(received.unbind())], [message], AllgatherOptions()),
        )

    def exchange(self, messages: torch.Tensor) -> tuple[torch.Tensor, Work | None]:
        """Row i of ``messages [sites, bytes]`` goes to site i; the rows that come in return."""
        messages = messages.to(self._device)
        if self.sites == 1:
            return messages, None
        received = torch.empty_like(messages)
        return received, self._issue(
            received, lambda group: group.alltoall_base(received, messages, [], [], AllToAllOptions())
        )

    def exchange_uneven(
        self, messages: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> tuple[torch.Tensor, Work | None]:
        """``messages[i]`` (uint8, any size) goes to site i; returns what comes back, ``sizes[i]`` bytes of each, joined."""
        outgoing = torch.cat(list(messages)).to(self._device)
        if self.sites == 1:
            return outgoing, None
        received = outgoing.new_empty(sum(sizes))
        sent = [message.numel() for message in messages]
        return received, self._issue(
            received, lambda group: group.alltoall_base(received, outgoing, list(sizes), sent, AllToAllOptions())
        )

    def wait(self, work: Work | None) -> None:
        """Until the messages are there."""
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as error:
            self._manager.report_error(error)

    def _issue(self, received: torch.Tensor, start: Callable[[ProcessGroup], Work]) -> Work | None:
        if self._manager.errored() is None:
            try:
                return start(self._manager.process_group)
            except RuntimeError as error:
                self._manager.report_error(error)
        received.zero_()
        return None
