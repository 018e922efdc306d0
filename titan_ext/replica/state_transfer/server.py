"""An HTTP server for peers that cannot be relied on to be quick, or to be peers."""

import logging
import socket
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from titan_ext.replica.state_transfer.sockets import OpenSockets

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 256


class StateServer(ThreadingHTTPServer):
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
