"""Collectives between the sites of a quorum: what comes back, and when it is there."""

from collections.abc import Sequence
from typing import Any

import torch

from titan_ext.lab.network import Network
from titan_ext.lab.simulation import Signal, Simulation

# Sums and messages of a reduction are scaled to the size of the file's model; tables of statuses, weights and norms,
# which are int64 and float64, are as they are.
_SCALED = (torch.float32, torch.uint8)


class Group:
    """The sites of one quorum, until it breaks.

    Args:
        simulation: whose time passes.
        network: that carries the messages.
        sites: places of the members in the network, by rank.
        scale: bytes on the wire for one that is handed over.
        timeout_seconds: after which a collective has failed.
    """

    def __init__(
        self, simulation: Simulation, network: Network, sites: Sequence[int], scale: float, timeout_seconds: float
    ) -> None:
        self.sites = list(sites)
        self.broken: str | None = None
        self.simulation = simulation
        self.network = network
        self.scale = scale
        self._timeout = timeout_seconds
        self._collectives: dict[Any, Collective] = {}

    def join(self, index: int, rank: int, kind: type["Collective"], offer: Any) -> "Collective":
        """Take part in the group's collective number ``index``."""
        return self._join(index, self.sites, rank, kind, offer)

    def send(self, index: int, rank: int, target: int, tag: int, message: torch.Tensor) -> "Collective":
        """Send the ``index``-th message of a tag to another member; it goes once that receives it."""
        return self._join((rank, target, tag, index), [self.sites[rank], self.sites[target]], 0, Message, message)

    def receive(self, index: int, rank: int, source: int, tag: int) -> "Collective":
        """Receive the ``index``-th message of a tag from another member."""
        return self._join((source, rank, tag, index), [self.sites[source], self.sites[rank]], 1, Message, None)

    def _join(self, key: Any, sites: Sequence[int], rank: int, kind: type["Collective"], offer: Any) -> "Collective":
        if key not in self._collectives:
            self._collectives[key] = kind(self, sites)
            self.simulation.after(self._timeout, lambda: self._check(key))
        collective = self._collectives[key]
        assert type(collective) is kind, "all sites issue collectives in one order"
        if self.broken is not None:
            collective.fail()
        collective.join(rank, offer)
        return collective

    def break_up(self, reason: str) -> None:
        """What is under way fails, and all that follows."""
        self.broken = self.broken or reason
        for collective in self._collectives.values():
            collective.fail()

    def _check(self, key: Any) -> None:
        if not self._collectives[key].is_over:
            self.break_up("a collective timed out")


class Collective:
    """One collective of a group. Its messages start when the last of ``sites`` has joined it."""

    def __init__(self, group: Group, sites: Sequence[int]) -> None:
        self.failed = False
        self._group, self._sites = group, list(sites)
        self._offers: dict[int, Any] = {}
        self._done = [Signal(group.simulation) for _ in sites]

    @property
    def is_over(self) -> bool:
        """Whether every member has its result, or none will."""
        return all(signal.is_set for signal in self._done)

    def join(self, rank: int, offer: Any) -> None:
        """A member comes, with what it gives."""
        self._offers[rank] = offer
        if not self.failed and len(self._offers) == len(self._sites):
            self._start()

    def fail(self) -> None:
        """No member that has no result yet will have one."""
        if not self.is_over:
            self.failed = True
            for signal in self._done:
                signal.set()

    def wait(self, rank: int) -> None:
        """Until the member has its result.

        Raises:
            RuntimeError: it will not.
        """
        self._group.simulation.wait(self._done[rank])
        if self.failed:
            raise RuntimeError(self._group.broken or "the connection was closed")

    def offers(self) -> list[Any]:
        """What every member gave, by rank."""
        return [self._offers[rank] for rank in range(len(self._offers))]

    def _start(self) -> None:
        raise NotImplementedError

    def _ring(self, payload: float, hops: int) -> None:
        """Every member sends to the next one; what it receives is the next it sends."""
        count = len(self._done)
        if count == 1 or hops == 0:
            for signal in self._done:
                signal.set()
            return
        for rank in range(count):
            self._hop(rank, payload, hops)

    def _hop(self, rank: int, payload: float, left: int) -> None:
        if self.failed:
            return
        sites, target = self._sites, (rank + 1) % len(self._sites)

        def arrived() -> None:
            if left > 1:
                self._hop(target, payload, left - 1)
            else:
                self._done[target].set()

        self._group.network.send(sites[rank], sites[target], payload, arrived)

    def _bytes(self, tensor: torch.Tensor) -> float:
        scale = self._group.scale if tensor.dtype in _SCALED else 1.0
        return tensor.numel() * tensor.element_size() * scale


class AllReduce(Collective):
    """The sum of a tensor over the members: a ring."""

    _sum: torch.Tensor | None = None

    def result(self) -> torch.Tensor:
        """The sum, by rank one after the other."""
        if self._sum is None:
            self._sum = torch.stack(self.offers()).sum(0)
        return self._sum

    def _start(self) -> None:
        count = len(self._done)
        self._ring(self._bytes(self._offers[0]) / count, 2 * (count - 1))


class AllGather(Collective):
    """Every member's message to all: a ring."""

    def _start(self) -> None:
        self._ring(self._bytes(self._offers[0]), len(self._done) - 1)


class AllToAll(Collective):
    """A message of its own from every member to every other one."""

    def _start(self) -> None:
        count, sites = len(self._done), self._sites
        missing = [count - 1] * count
        if count == 1:
            self._done[0].set()

        def arrived(target: int) -> None:
            missing[target] -= 1
            if missing[target] == 0:
                self._done[target].set()

        for apart in range(1, count):
            for rank in range(count):
                target = (rank + apart) % count
                payload = self._bytes(self._offers[rank][target])
                self._group.network.send(sites[rank], sites[target], payload, lambda target=target: arrived(target))  # type: ignore[misc]


class Message(Collective):
    """From one site to another."""

    def _start(self) -> None:
        def arrived() -> None:
            for signal in self._done:
                signal.set()

        source, target = self._sites
        self._group.network.send(source, target, self._bytes(self._offers[0]), arrived)
