"""How a joining site gets the members' shared state: over HTTP, in a format that cannot run code."""

import logging
import secrets
import socket
import ssl
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torchft.checkpointing import CheckpointTransport

from titan_ext.replica.address import url_host
from titan_ext.replica.chunks import CHUNK_BYTES, ROOT, Announcement, digest, parse_path
from titan_ext.replica.fetch import fetch_state
from titan_ext.replica.sockets import OpenSockets, cut
from titan_ext.replica.state_format import Message
from titan_ext.replica.tls import Tls

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 256
_POLL_SECONDS = 0.1


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
        streams: int = 2,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._hostname = hostname
        self._timeout = timeout.total_seconds()
        self._tls = tls
        self._streams = streams
        self._chunk_bytes = chunk_bytes
        self._changed = threading.Condition()
        self._offer: _Offer | None = None
        self._readers: set[socket.socket] = set()
        self._stopping = False
        self._server = _Server(("::", port), self._handler(), self._timeout, tls and tls.server)
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
        message = Message(state_dict)
        tag = f'"{secrets.token_hex(16)}"'
        with self._changed:
            self._offer = _Offer(step, message, Announcement(tag, message.num_bytes, self._chunk_bytes))
            self._changed.notify_all()

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
        context = self._tls and self._tls.client
        return fetch_state(metadata, step, timeout=timeout.total_seconds(), streams=self._streams, context=context)

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

            def do_GET(self) -> None:
                transport._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                logger.debug("state transport: " + format, *args)

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
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
            if refusal is None:
                self._readers.add(connection)
        if refusal is not None:
            request.send_error(*refusal)
            return
        try:
            _send(request, offer, first, last)
        finally:
            with self._changed:
                self._readers.discard(connection)
                self._changed.notify_all()

    def _offered(self, step: int, tag: str | None) -> _Offer | None:
        def fits() -> bool:
            return self._offer is not None and self._offer.step == step

        if tag is None:
            # The joining site may ask before this one has finished its own part of the quorum.
            self._changed.wait_for(lambda: fits() or self._stopping, timeout=self._timeout)
        return self._offer if fits() and tag in (None, self._offer.announcement.tag) else None


def _send(request: BaseHTTPRequestHandler, offer: _Offer, first: int, last: int) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "application/octet-stream")
    request.send_header("Content-Length", str(offer.announcement.answer_bytes(first, last)))
    for name, value in offer.announcement.headers().items():
        request.send_header(name, value)
    request.end_headers()
    for chunk in range(first, last + 1):
        seen = digest()
        for piece in offer.message.pieces(*offer.announcement.span(chunk)):
            seen.update(piece)
            request.wfile.write(piece)
        request.wfile.write(seen.digest())


class _Server(ThreadingHTTPServer):
    """An HTTP server that cuts a connection ``timeout`` seconds after its last request, whatever its peer does."""

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        timeout: float,
        context: ssl.SSLContext | None,
    ) -> None:
        self.open = OpenSockets()
        self._seconds = timeout
        self._context = context
        super().__init__(address, handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._context is not None:
            # Not the handshake yet: a peer that is slow at it must not keep the others waiting.
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        connection.settimeout(self._seconds)
        self.open.add(connection, time.monotonic() + self._seconds)
        return connection, address

    def verify_request(self, request: socket.socket, client_address: Any) -> bool:
        return len(self.open) <= _MAX_CONNECTIONS

    def finish_request(self, request: socket.socket, client_address: Any) -> None:
        if self._context is not None:
            request.do_handshake()
        super().finish_request(request, client_address)

    def close_request(self, request: socket.socket) -> None:
        self.open.discard(request)
        super().close_request(request)

    def service_actions(self) -> None:
        self.open.cut_expired()

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # Peers that leave or lack a certificate are no faults of this program; anything else is.
        logger.warning(
            "state transport: lost %s (%r)", client_address[0], error, exc_info=not isinstance(error, OSError)
        )
