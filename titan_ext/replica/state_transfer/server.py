"""The HTTP server that sends offered state, for peers that cannot be relied on to be quick, or to be peers."""

import logging
import socket
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.chunks import ROOT, chunk_digest, parse_path
from titan_ext.replica.state_transfer.handshake import ServerHandshake
from titan_ext.replica.state_transfer.offers import Offer, StateOffers
from titan_ext.replica.state_transfer.sockets import OpenSockets
from titan_ext.replica.streams.distance import frame_bytes_sent
from titan_ext.replica.streams.pace import Pace

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_MAX_CONNECTIONS = 256
_PACED_BYTES = 128 * 1024


class StateServer(ThreadingHTTPServer):
    """Serves offers from a thread of its own, each connection from another one.

    A connection is cut ``timeout`` seconds after its last request, whatever its peer does.

    Args:
        port: to listen on, on all interfaces; 0 takes a free one.
        offers: what to serve.
        timeout: in seconds.
        context: for TLS; None: plain HTTP.
        secret: what clients have to prove to hold; None: everybody is served.
        pace: what sending is held to.
    """

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int,
        offers: StateOffers,
        timeout: float,
        context: ssl.SSLContext | None,
        secret: Secret | None,
        pace: Pace,
    ) -> None:
        self.offers = offers
        self.secret = secret
        self.pace = pace
        self.seconds = timeout
        self.open_sockets = OpenSockets()
        self.frame_bytes_sent = 0
        """Over connections that have ended."""
        self._context = context
        super().__init__(("::", port), _Handler)
        self._thread = threading.Thread(
            target=self.serve_forever, args=[_POLL_SECONDS], daemon=True, name="titan_ext-state"
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def stop(self, wait: bool) -> None:
        """Accept no more, cut all connections, and ``wait`` for the server's thread."""
        self.shutdown()
        self.server_close()
        self.open_sockets.cut_all()
        if wait:
            self._thread.join()

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._context is not None:
            # Not the handshake yet: a peer that is slow at it must not keep the others waiting.
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        connection.settimeout(self.seconds)
        self.allow(connection)
        return connection, address

    def allow(self, connection: socket.socket) -> None:
        """Give the peer ``timeout`` seconds from now."""
        self.open_sockets.add(connection, time.monotonic() + self.seconds)

    def verify_request(self, request: socket.socket, client_address: Any) -> bool:
        return len(self.open_sockets) <= _MAX_CONNECTIONS

    def finish_request(self, request: socket.socket, client_address: Any) -> None:
        if self._context is not None:
            request.do_handshake()  # type: ignore[attr-defined]
        super().finish_request(request, client_address)

    def close_request(self, request: socket.socket) -> None:
        self.frame_bytes_sent += frame_bytes_sent(request)
        self.open_sockets.discard(request)
        super().close_request(request)

    def service_actions(self) -> None:
        self.open_sockets.cut_expired()

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # Peers that leave or lack a certificate are no faults of this program; anything else is.
        logger.warning(
            "state transport: lost %s (%r)", client_address[0], error, exc_info=not isinstance(error, OSError)
        )


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: StateServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.timeout = self.server.seconds  # type: ignore[misc]  # of each read and write
        super().setup()
        secret = self.server.secret
        self._handshake = None if secret is None else ServerHandshake(secret)

    def do_GET(self) -> None:
        if self._handshake is None or self._authenticate(self._handshake):
            self._answer()

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("state transport: " + format, *args)

    def _authenticate(self, handshake: ServerHandshake) -> bool:
        """Whether the client has proven to hold the secret; otherwise the request has been answered."""
        status = handshake.receive(self.headers)
        if status == 401:
            self.send_response(status)
            self._send_headers(handshake.response() | {"Content-Length": "0"})
        elif status == 403:
            logger.warning(
                "state transport: %s is refused: it does not hold this site's secret (replica.secret_file)",
                self.client_address[0],
            )
            self.send_error(status, "not the secret of this site")
        return status == 200

    def _answer(self) -> None:
        requested = parse_path(self.path)
        if requested is None:
            self.send_error(404, f"only {ROOT}<step>/<first>-<last> is served")
            return
        step, first, last = requested
        tag = self.headers.get("If-Match")
        # The peer is not to blame for the time that this site takes to have the state.
        self.server.open_sockets.add(self.connection)
        with self.server.offers.reading(step, tag, self.connection) as offer:
            self.server.allow(self.connection)
            if offer is not None and first <= last < offer.info.num_chunks:
                self._send(offer, first, last)
            elif offer is not None:
                self.send_error(416, "no such chunks")
            elif tag is not None:
                self.send_error(412, "this state is no longer offered")
            else:
                self.send_error(404, "no state for this step")

    def _send(self, offer: Offer, first: int, last: int) -> None:
        info, handshake = offer.info, self._handshake
        self.send_response(200)
        self._send_headers(
            {"Content-Type": "application/octet-stream", "Content-Length": str(info.answer_bytes(first, last))}
            | info.headers()
            | (handshake.response() if handshake else {})
        )
        key = None if handshake is None else handshake.key
        for chunk in range(first, last + 1):
            digest = chunk_digest(key, offer.step, info, chunk)
            for piece in offer.message.pieces(*info.span(chunk)):
                digest.update(piece)
                self._write_at_pace(piece)
            self.wfile.write(digest.digest())

    def _write_at_pace(self, piece: memoryview) -> None:
        for start in range(0, len(piece), _PACED_BYTES):
            part = piece[start : start + _PACED_BYTES]
            while (wait := self.server.pace.seconds_to_wait()) > 0:
                time.sleep(wait)
            self.server.pace.spend(len(part))
            self.wfile.write(part)

    def _send_headers(self, headers: dict[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
