"""Messages between the sites of a quorum: what comes, and when it is there."""

from typing import Any

import torch

from titan_ext.lab.network import Network
from titan_ext.lab.simulation import Signal, Simulation

# What reductions send is scaled to the size of the file's model; tables of statuses, weights and norms, which are int64
# and float64, are as they are.
_SCALED = (torch.float32, torch.uint8)


class Group:
    """The sites of one quorum, until it breaks.

    Args:
        simulation: whose time passes.
        network: that carries the messages.
        sites: places of the members in the network, by rank.
        scale: bytes on the wire for one that is handed over.
        timeout_seconds: after which a message has failed.
    """

    def __init__(
        self, simulation: Simulation, network: Network, sites: list[int], scale: float, timeout_seconds: float
    ) -> None:
        self.sites = sites
        self.broken: str | None = None
        self._simulation, self._network = simulation, network
        self._scale = scale
        self._timeout = timeout_seconds
        self._messages: dict[Any, Message] = {}

    def send(self, index: int, rank: int, target: int, tag: int, content: torch.Tensor) -> "Message":
        """Send the ``index``-th message of a tag to another member; it goes at once."""
        message = self._message((rank, target, tag, index))
        message.content = content.clone()
        size = content.nbytes * (self._scale if content.dtype in _SCALED else 1.0)
        self._network.send(self.sites[rank], self.sites[target], size, message.arrived.set)
        return message

    def receive(self, index: int, rank: int, source: int, tag: int) -> "Message":
        """Receive the ``index``-th message of a tag from another member."""
        return self._message((source, rank, tag, index))

    def break_up(self, reason: str) -> None:
        """What is under way fails, and all that follows."""
        self.broken = self.broken or reason
        for message in self._messages.values():
            message.fail(self.broken)

    def _message(self, key: Any) -> "Message":
        """The message, for whichever of its ends comes first."""
        if key not in self._messages:
            self._messages[key] = Message(self._simulation)
            self._simulation.after(self._timeout, lambda: self._check(key))
        message = self._messages[key]
        if self.broken is not None:
            message.fail(self.broken)
        return message

    def _check(self, key: Any) -> None:
        if not self._messages[key].arrived.is_set:
            self.break_up("a message took too long")


class Message:
    """From one site to another."""

    def __init__(self, simulation: Simulation) -> None:
        self.content: torch.Tensor | None = None
        self.arrived = Signal(simulation)
        """Or it has failed."""
        self._simulation = simulation
        self._failure: str | None = None

    def fail(self, reason: str) -> None:
        """It will not arrive, unless it has."""
        if not self.arrived.is_set:
            self._failure = reason
            self.arrived.set()

    def wait(self) -> None:
        """Until it is there; called by a process of either end.

        Raises:
            RuntimeError: it will not come.
        """
        self._simulation.wait(self.arrived)
        if self._failure is not None:
            raise RuntimeError(self._failure)
