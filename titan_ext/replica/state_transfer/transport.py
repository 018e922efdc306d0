"""How a joining site gets the members' shared state: over HTTP, in a format that cannot run code."""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torchft.checkpointing import CheckpointTransport

from titan_ext.replica.address import url_host
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.chunks import CHUNK_BYTES, LATEST, ROOT, Announcement, chunk_digest, parse_path
from titan_ext.replica.state_transfer.fetch import fetch_state
from titan_ext.replica.state_transfer.handshake import Server, admit
from titan_ext.replica.state_transfer.server import StateServer
from titan_ext.replica.state_transfer.sockets import cut
from titan_ext.replica.state_transfer.state_format import Message
from titan_ext.replica.state_transfer.tls import Tls

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_COPY_SECONDS = 60.0  # that a newcomer waits for the end of an inner step, between two of which a copy is made


@dataclass(frozen=True)
class _Offer:
    step: int
    message: Message
    announcement: Announcement


class StateTransport(CheckpointTransport[Any]):
    """Serves this rank's shared state to the same rank of a joining site.

    Args:
        hostname: name or address under which other sites reach this machine.
        port: port to serve on; 0 takes a free one.
        timeout: how long a request waits for the state, how long it may then take, and how long
            ``disallow_checkpoint`` bears with it.
        tls: certificates for both directions; None: plain HTTP.
        secret: what both ends prove to hold; None: everybody is served.
        streams: connections over which a state is fetched.
        chunk_bytes: size of the pieces that are checked and, after a failure, fetched again.
    """

    def __init__(
        self,
        hostname: str,
        port: int,
        timeout: timedelta,
        *,
        tls: Tls | None = None,
        secret: Secret | None = None,
        streams: int = 2,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._hostname = hostname
        self._timeout = timeout.total_seconds()
        self._tls = tls
        self._secret = secret
        self._streams = streams
        self._chunk_bytes = chunk_bytes
        self._changed = threading.Condition()
        self._offer: _Offer | None = None
        self._copy: tuple[int, _Offer] | None = None
        self._copies_made = self._copy_wanted = self._in_quorum = False
        self._ahead: Any = None
        self._readers: set[socket.socket] = set()
        self._stopping = False
        self._server = StateServer(("::", port), self._handler(), self._timeout, tls and tls.server)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=[_POLL_SECONDS], daemon=True, name="titan_ext-state"
        )
        self._thread.start()

    def metadata(self) -> str:
        """The address that a joining site is told."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{url_host(self._hostname)}:{self._server.server_address[1]}{ROOT}"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Let joining sites fetch ``state_dict``; its tensors must not change until ``disallow_checkpoint``."""
        if torch.accelerator.is_available():
            # Connections read the tensors from threads that know nothing of the streams that write them.
            torch.accelerator.synchronize()
        offer = self._offer_of(step, state_dict)
        with self._changed:
            self._offer = offer
            self._changed.notify_all()

    def serve_snapshot_requests(self, step: int, make: Callable[[], Any]) -> None:
        """Call between inner steps: makes the copy that a newcomer has asked for, and forgets one that is outdated.

        Args:
            step: of the manager.
            make: the state, whose tensors may change after this returns.
        """
        with self._changed:
            self._copies_made, self._in_quorum = True, False
            if self._copy is not None and self._copy[0] != step:
                self._copy = None
            if not self._copy_wanted or self._copy is not None:
                return
        state = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), make())
        offer = self._offer_of(LATEST, state)
        with self._changed:
            self._copy, self._copy_wanted = (step, offer), False
            self._changed.notify_all()

    @contextmanager
    def in_quorum(self) -> Iterator[None]:
        """While this lasts nobody waits for a copy: this site may be waiting for the one that asks."""
        with self._changed:
            self._in_quorum = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self._in_quorum = False

    def fetch_ahead(self, metadata: str) -> None:
        """Fetch a copy of a member's state, for ``recv_checkpoint`` to return if the member has not moved on.

        Raises:
            ValueError, OSError: as ``recv_checkpoint``.
        """
        self._ahead = self._fetch(metadata, LATEST, self._timeout)

    def forget_ahead(self) -> None:
        """Drop a copy that was fetched and not needed."""
        self._ahead = None

    def _offer_of(self, step: int, state: Any) -> _Offer:
        message = Message(state)
        tag = f'"{secrets.token_hex(16)}"'
        return _Offer(step, message, Announcement(tag, message.num_bytes, self._chunk_bytes))

    def _fetch(self, metadata: str, step: int, seconds: float) -> Any:
        context = self._tls and self._tls.client
        return fetch_state(
            metadata, step, timeout=seconds, streams=self._streams, context=context, secret=self._secret
        )

    def disallow_checkpoint(self) -> None:
        """Stop serving; returns once no connection reads the tensors, and cuts those that do for too long."""
        with self._changed:
            self._offer = None
            if self._changed.wait_for(lambda: not self._readers, timeout=self._timeout):
                return
            logger.warning("shared state: cutting %d connection(s) too slow to fetch it", len(self._readers))
            cut(self._readers)
            # No longer for the network: what is left is to hash and copy one piece.
            if not self._changed.wait_for(lambda: not self._readers, timeout=self._timeout):
                logger.error("shared state: still being read; the digests will not fit what changes now")

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch the shared state of a member.

        Raises:
            ValueError: what it sent is malformed or damaged again and again.
            OSError: it cannot be reached, refuses or stopped answering; TimeoutError after ``timeout``.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead["torchft"]["step"] == step:
            return ahead
        return self._fetch(metadata, step, timeout.total_seconds())

    def shutdown(self, wait: bool = True) -> None:
        """Stop the server and cut its connections."""
        with self._changed:
            self._stopping = True
            self._offer = None
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._server.open.cut_all()
        if wait:
            self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        transport = self

        class Handler(BaseHTTPRequestHandler):
            timeout = transport._timeout
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                self.introduction = transport._secret and Server(transport._secret)

            def do_GET(self) -> None:
                if self.introduction is None or admit(self, self.introduction):
                    transport._answer(self, self.introduction)

            def log_message(self, format: str, *args: object) -> None:
                logger.debug("state transport: " + format, *args)

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler, introduction: Server | None) -> None:
        asked = parse_path(request.path)
        if asked is None:
            request.send_error(404, f"only {ROOT}<step>/<first>-<last> is served")
            return
        step, first, last = asked
        connection = request.connection
        refusal = 404, "no state for this step"
        # The wait for this machine's own state is not the peer's to answer for.
        self._server.open.add(connection)
        with self._changed:
            offer = self._offered(step, request.headers.get("If-Match"))
            self._server.open.add(connection, time.monotonic() + self._timeout)
            if offer is not None:
                refusal = None if first <= last < offer.announcement.num_chunks else (416, "no such chunks")
            elif "If-Match" in request.headers:
                refusal = 412, "this state is no longer offered"
            if refusal is None and step != LATEST:
                self._readers.add(connection)
        if refusal is not None:
            request.send_error(*refusal)
            return
        try:
            _send(request, introduction, offer, first, last)
        finally:
            with self._changed:
                self._readers.discard(connection)
                self._changed.notify_all()

    def _offered(self, step: int, tag: str | None) -> _Offer | None:
        if step == LATEST:
            return self._copied(tag)

        def fits() -> bool:
            return self._offer is not None and self._offer.step == step

        if tag is None:
            # The joining site may ask before this one has finished its own part of the quorum.
            self._changed.wait_for(lambda: fits() or self._stopping, timeout=self._timeout)
        return self._offer if fits() and tag in (None, self._offer.announcement.tag) else None

    def _copied(self, tag: str | None) -> _Offer | None:
        if tag is None and self._copies_made and not self._in_quorum:
            self._copy_wanted = self._copy is None
            self._changed.wait_for(
                lambda: self._copy is not None or self._in_quorum or self._stopping, timeout=_COPY_SECONDS
            )
        offer = self._copy[1] if self._copy is not None else None
        return offer if offer is not None and tag in (None, offer.announcement.tag) else None


def _send(
    request: BaseHTTPRequestHandler, introduction: Server | None, offer: _Offer, first: int, last: int
) -> None:
    announcement = offer.announcement
    request.send_response(200)
    request.send_header("Content-Type", "application/octet-stream")
    request.send_header("Content-Length", str(announcement.answer_bytes(first, last)))
    for name, value in (announcement.headers() | (introduction.headers() if introduction else {})).items():
        request.send_header(name, value)
    request.end_headers()
    key = introduction and introduction.key
    for chunk in range(first, last + 1):
        seen = chunk_digest(key, offer.step, announcement, chunk)
        for piece in offer.message.pieces(*announcement.span(chunk)):
            seen.update(piece)
            request.wfile.write(piece)
        request.wfile.write(seen.digest())
