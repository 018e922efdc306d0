"""The state that this rank offers to the same rank of a joining site: in a quorum, or as a snapshot between quorums."""

import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from titan_ext.replica.state_transfer.chunks import LATEST, MessageInfo
from titan_ext.replica.state_transfer.sockets import cut
from titan_ext.replica.state_transfer.state_format import OutgoingMessage

logger = logging.getLogger(__name__)

_SNAPSHOT_SECONDS = 60.0  # that a newcomer waits for the end of an inner step, between two of which snapshots are made


@dataclass(frozen=True)
class Offer:
    """A state that can be fetched."""

    step: int
    """torchft's, or ``LATEST`` for a snapshot."""
    message: OutgoingMessage
    info: MessageInfo


class StateOffers:
    """The offers of one rank: written by its training thread, read by the threads of the server's connections.

    Args:
        timeout: seconds that a request waits for the state of a quorum, and ``withdraw`` for its readers.
        chunk_bytes: size of the pieces that are checked and, after a failure, fetched again.
    """

    def __init__(self, timeout: float, chunk_bytes: int) -> None:
        self._timeout = timeout
        self._chunk_bytes = chunk_bytes
        # Guards all below. Its waits end at a change of what they wait for, or at ``close``.
        self._changed = threading.Condition()
        self._offer: Offer | None = None
        self._snapshot: tuple[int, Offer] | None = None
        self._makes_snapshots = self._snapshot_wanted = self._in_quorum = False
        self._readers: set[socket.socket] = set()
        self._closed = False

    # -- the training thread -----------------------------------------------------------------

    def publish(self, step: int, state: Any) -> None:
        """Offer the state of a quorum; its tensors are read where they lie and must not change until ``withdraw``."""
        if torch.accelerator.is_available():
            # Connections read the tensors from threads that know nothing of the streams that write them.
            torch.accelerator.synchronize()
        offer = self._offer_of(step, state)
        with self._changed:
            self._offer = offer
            self._changed.notify_all()

    def withdraw(self) -> None:
        """Stop offering; returns once no connection reads the tensors, and cuts those that do for too long.

        The caller changes the tensors next: a connection that still read them would send a mixture of two states.
        """
        with self._changed:
            self._offer = None
            if self._changed.wait_for(lambda: not self._readers, timeout=self._timeout):
                return
            logger.warning("shared state: cutting %d connection(s) too slow to fetch it", len(self._readers))
            cut(self._readers)
            # No longer for the network: what is left is to hash and copy one piece.
            if not self._changed.wait_for(lambda: not self._readers, timeout=self._timeout):
                logger.error("shared state: still being read; the digests will not fit what changes now")

    def serve_snapshot_requests(self, step: int, make: Callable[[], Any]) -> None:
        """Call between inner steps: makes the snapshot that a newcomer has asked for, and drops one that is outdated.

        Args:
            step: torchft's.
            make: the state, whose tensors may change after this returns.
        """
        with self._changed:
            self._makes_snapshots, self._in_quorum = True, False
            if self._snapshot is not None and self._snapshot[0] != step:
                self._snapshot = None
            if not self._snapshot_wanted or self._snapshot is not None:
                return
        # Copied: while the snapshot is fetched, training changes the tensors.
        state = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), make())
        offer = self._offer_of(LATEST, state)
        with self._changed:
            self._snapshot, self._snapshot_wanted = (step, offer), False
            self._changed.notify_all()

    @contextmanager
    def in_quorum(self) -> Iterator[None]:
        """While this lasts nobody waits for a snapshot: this site may be waiting for the one that asks (a deadlock)."""
        with self._changed:
            self._in_quorum = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._in_quorum = False

    def close(self) -> None:
        """Offer nothing from now on, and let nobody wait."""
        with self._changed:
            self._closed = True
            self._offer = None
            self._changed.notify_all()

    # -- the server's threads ----------------------------------------------------------------

    @contextmanager
    def reading(self, step: int, tag: str | None, reader: socket.socket) -> Iterator[Offer | None]:
        """The offer of a step, if there is one, for as long as the context lasts: ``withdraw`` waits for its end.

        Waits for the offer where no tag is given.

        Args:
            step: torchft's, or ``LATEST``.
            tag: of the one offer that is wanted.
            reader: the connection, to be cut if it takes too long.
        """
        with self._changed:
            offer = self._latest_snapshot(tag) if step == LATEST else self._of_step(step, tag)
            # Within the same lock as the look-up: between the two the offer could be withdrawn.
            if offer is not None and step != LATEST:
                self._readers.add(reader)
        try:
            yield offer
        finally:
            with self._changed:
                self._readers.discard(reader)
                self._changed.notify_all()

    def _of_step(self, step: int, tag: str | None) -> Offer | None:
        def is_offered() -> bool:
            return self._offer is not None and self._offer.step == step

        if tag is None:
            # The joining site may ask before this one has finished its own part of the quorum.
            self._changed.wait_for(lambda: is_offered() or self._closed, timeout=self._timeout)
        return self._offer if is_offered() and tag in (None, self._offer.info.tag) else None

    def _latest_snapshot(self, tag: str | None) -> Offer | None:
        if tag is None and self._makes_snapshots and not self._in_quorum:
            self._snapshot_wanted = self._snapshot is None
            self._changed.wait_for(
                lambda: self._snapshot is not None or self._in_quorum or self._closed, timeout=_SNAPSHOT_SECONDS
            )
        offer = self._snapshot[1] if self._snapshot is not None else None
        return offer if offer is not None and tag in (None, offer.info.tag) else None

    def _offer_of(self, step: int, state: Any) -> Offer:
        message = OutgoingMessage(state)
        tag = f'"{secrets.token_hex(16)}"'
        return Offer(step, message, MessageInfo(tag, message.num_bytes, self._chunk_bytes))
