"""Messages of bytes between the sites of a quorum, and buckets of them that overlap."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import Work

from titan_ext.semi_sync.wire.manager import QuorumWire, wire_device

MessagesInTurn = Iterator["Messages"]
"""The work on one bucket: yields the messages that it waits for before it goes on."""


@dataclass(slots=True)
class Traffic:
    """Bytes of messages, counted where the wire takes and brings them."""

    sent: int = 0
    received: int = 0
    seconds: float = 0.0
    """In which nothing was done but to wait for them."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.sent + other.sent, self.received + other.received, self.seconds + other.seconds)


class Messages:
    """Messages under way to and from other sites.

    Args:
        manager: is told of an error.
        works: of the messages; none of a failed or empty exchange.
        sent: what is sent, kept until it has left.
        received: what is received; zeros after an error.
        traffic: in which what has come is counted.
        now: what waiting is timed by.
    """

    def __init__(
        self,
        manager: QuorumWire,
        works: Sequence[Work],
        sent: Sequence[torch.Tensor] = (),
        received: Sequence[torch.Tensor] = (),
        traffic: Traffic | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._manager, self._works, self._sent, self._received = manager, list(works), sent, received
        self._traffic, self._now = traffic, now
        self.failed = manager.errored() is not None
        """Whether zeros stand for what did not come."""

    def have_arrived(self) -> bool:
        """Whether waiting would take no time."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Until all are sent and received."""
        started = self._now()
        try:
            for work in self._works:
                work.wait()
            if self._traffic is not None:
                self._traffic.seconds += self._now() - started
                self._traffic.received += sum(each.nbytes for each in self._received)
        except RuntimeError as error:
            self._manager.report_error(error)
            self.failed = True
            for each in self._received:
                each.zero_()
        self._works, self._sent, self._traffic = [], (), None


class ByteCollectives:
    """Messages of bytes between the sites; an error is reported to the manager and zeros arrive.

    Both ends name a message by a tag; messages of one tag keep their order, others need none. All of it is sends and
    receives between two sites: whoever needs a message gets it straight from where it is, in half a round trip.
    """

    def __init__(self, manager: QuorumWire, now: Callable[[], float] = time.perf_counter) -> None:
        self._manager, self._now = manager, now
        self.device = wire_device(manager)
        self.sites = manager.num_participants()
        self.rank = manager.participating_rank() if self.sites > 1 else 0
        """Of this site among them."""
        self.others = [site for site in range(self.sites) if site != self.rank]
        self.traffic = Traffic()

    def gather(self, message: torch.Tensor, tag: int = 0) -> tuple[torch.Tensor, Messages]:
        """Every site's ``message [bytes]`` as ``[sites, bytes]``."""
        message = message.to(self.device)
        received = message.new_empty(self.sites, message.numel())
        received[self.rank] = message
        return received, self.swap(dict.fromkeys(self.others, message), self._rows(received), tag)

    def exchange(self, messages: torch.Tensor, tag: int = 0) -> tuple[torch.Tensor, Messages]:
        """Row i of ``messages [sites, bytes]`` goes to site i; the rows that come in return."""
        messages = messages.to(self.device)
        received = torch.empty_like(messages)
        received[self.rank] = messages[self.rank]
        return received, self.swap(self._rows(messages), self._rows(received), tag)

    def exchange_uneven(
        self, messages: Sequence[torch.Tensor], sizes: Sequence[int], tag: int = 0
    ) -> tuple[list[torch.Tensor], Messages]:
        """``messages[i]`` (uint8, any size) goes to site i; returns what comes back, ``sizes[i]`` bytes of site i."""
        outgoing = [message.to(self.device) for message in messages]
        received = [outgoing[0].new_empty(size) for size in sizes]
        received[self.rank] = outgoing[self.rank]
        to_others, from_others = ({site: each[site] for site in self.others} for each in (outgoing, received))
        return received, self.swap(to_others, from_others, tag)

    def swap(
        self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor], tag: int = 0
    ) -> Messages:
        """Send a tensor to each of some sites, and receive one from each of some, by rank.

        Args:
            outgoing: contiguous, on ``device``; unchanged until the messages have arrived.
            incoming: contiguous, on ``device``; overwritten.
            tag: names the messages.
        """
        works: list[Work] = []
        if self._manager.errored() is None:
            try:
                for site in sorted({*outgoing, *incoming}):
                    works += self._swap_with(site, outgoing.get(site), incoming.get(site), tag)
                return Messages(
                    self._manager, works, list(outgoing.values()), list(incoming.values()), self.traffic, self._now
                )
            except RuntimeError as error:
                self._manager.report_error(error)
        for each in incoming.values():
            each.zero_()
        return Messages(self._manager, [])

    def _swap_with(
        self, site: int, outgoing: torch.Tensor | None, incoming: torch.Tensor | None, tag: int
    ) -> list[Work]:
        group = self._manager.process_group
        works = []
        # Where a group takes one after the other (an accelerator's does), both ends must come to the same one first.
        for sends in (self.rank < site, self.rank > site):
            if sends and outgoing is not None and outgoing.numel():
                self.traffic.sent += outgoing.nbytes
                works.append(group.send([outgoing], site, tag))
            elif not sends and incoming is not None and incoming.numel():
                works.append(group.recv([incoming], site, tag))
        return works

    def _rows(self, tensor: torch.Tensor) -> dict[int, torch.Tensor]:
        return {site: tensor[site] for site in self.others}


def overlap(wire: ByteCollectives, buckets: Iterable[MessagesInTurn], at_most: int) -> None:
    """Work on buckets, up to ``at_most`` of them at a time: while one waits for its messages, others go on.

    Hazard: which one goes on when depends on what arrives; a tag that names bucket and turn keeps their messages apart.
    The groups of accelerators know no tags: there buckets take turns.
    """
    at_most = at_most if wire.device.type == "cpu" else 1
    under_way: deque[tuple[MessagesInTurn, Messages]] = deque()
    for bucket in buckets:
        while len(under_way) == at_most:
            _go_on(under_way)
        _step(bucket, under_way)
        while any(messages.have_arrived() for _, messages in under_way):
            _go_on(under_way)
    while under_way:
        _go_on(under_way)


def _go_on(under_way: deque[tuple[MessagesInTurn, Messages]]) -> None:
    """Take a bucket further whose messages are there, or else the oldest."""
    ready = (index for index, (_, messages) in enumerate(under_way) if messages.have_arrived())
    index = next(ready, 0)
    bucket, messages = under_way[index]
    del under_way[index]
    messages.wait()
    _step(bucket, under_way)


def _step(bucket: MessagesInTurn, under_way: deque[tuple[MessagesInTurn, Messages]]) -> None:
    messages = next(bucket, None)
    if messages is not None:
        under_way.append((bucket, messages))
