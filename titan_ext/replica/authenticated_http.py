"""Small HTTP servers of a site, and connections to them, whose ends prove to hold the run's secret where there is one.

The handshake is that of the transfer of state (``state_transfer/handshake.py``); a proof made for one kind of server is
none for another.
"""

import http.client
import logging
import socket
import threading
from collections.abc import Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.handshake import ClientHandshake, ServerHandshake
from titan_ext.replica.state_transfer.sockets import OpenSockets

logger = logging.getLogger(__name__)

_TOLD = 160
"""Characters of an answer that refuses, at most."""
_SILENT_SECONDS = 20.0
"""After which a connection that says nothing is cut."""


class AuthenticatedServer(ThreadingHTTPServer):
    """Answers on a thread of its own until it is stopped.

    Args:
        host: address to listen on; empty for all.
        port: 0 takes a free one.
        handler: answers a connection's requests.
        of: what is served, as the handshake names it.
        secret: what clients have to prove to hold; None: everybody is served.

    Raises:
        OSError: it cannot listen there.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, host: str, port: int, handler: type["AuthenticatedHandler"], *, of: str, secret: Secret | None
    ) -> None:
        self.of, self.secret = of, secret
        self.refused = 0
        """Requests of clients that did not prove to hold the secret."""
        self.stopping = threading.Event()
        self._open = OpenSockets()
        self.address_family = socket.AF_INET if _is_ipv4(host) else socket.AF_INET6
        super().__init__((host or "::", port), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=[0.1], daemon=True, name=f"titan_ext-{of}")
        self._thread.start()

    @property
    def port(self) -> int:
        """That it listens on."""
        return self.server_address[1]

    def stop(self) -> None:
        """Accept no more and end all connections."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        self._open.cut_all()
        self._thread.join()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        self._open.discard(request)
        super().close_request(request)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Not HTTPServer's, which looks up the name of the address: for seconds where no name server answers.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("%s server: lost %s", self.of, client_address[0], exc_info=True)


class AuthenticatedHandler(BaseHTTPRequestHandler):
    """One connection; a subclass answers requests of those that may be served."""

    server: AuthenticatedServer
    protocol_version = "HTTP/1.1"
    timeout = _SILENT_SECONDS
    disable_nagle_algorithm = True

    def answer(self, path: str, query: Mapping[str, list[str]]) -> None:
        """Answer a request, by ``send`` in most cases."""
        raise NotImplementedError

    def setup(self) -> None:
        super().setup()
        secret = self.server.secret
        self._handshake = ServerHandshake(secret, self.server.of) if secret is not None else None

    def do_GET(self) -> None:
        if self._handshake is None or self._authenticate(self._handshake):
            parts = urlsplit(self.path)
            self.answer(unquote(parts.path), parse_qs(parts.query))

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("%s server: " + format, self.server.of, *args)

    def send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        """Answer with all of ``body``."""
        proof = self._handshake.response() if self._handshake and status in (200, 404) else {}
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **proof, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def _authenticate(self, handshake: ServerHandshake) -> bool:
        """Whether the client has proven to hold the secret; otherwise the request has been answered."""
        status = handshake.receive(self.headers)
        if status == 401:
            self.send(status, b"", "text/plain", handshake.response())
        elif status == 403:
            self.server.refused += 1
            address, of = self.client_address[0], self.server.of
            logger.warning("%s server: %s is refused: it does not hold the run's secret", of, address)
            self.send(status, b"not the secret of this run (replica.secret_file)\n", "text/plain")
        return status == 200


class Refused(OSError):
    """A server answers, and not with what was asked for."""


class AuthenticatedConnection:
    """A connection to such a server, made when it is first used and made anew after an error. For one thread.

    Args:
        host: name or address.
        port: of the server.
        secret: to prove, and to have proven; None for a server that asks for none.
        of: what is served.
        seconds: how long an answer may take.
    """

    def __init__(self, host: str, port: int, secret: Secret | None, *, of: str, seconds: float) -> None:
        self._address, self._secret, self._of, self._seconds = (host, port), secret, of, seconds
        self._connection: http.client.HTTPConnection | None = None

    def get(self, path: str) -> tuple[Message, bytes] | None:
        """Headers, whose names are found in any case, and body; None for what is not there.

        Raises:
            OSError: there is no answer, or one that refuses (``Refused``); says why in a line.
        """
        try:
            return self._get(path)
        except (http.client.HTTPException, OSError) as error:
            self.close()
            if isinstance(error, Refused):
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise OSError(reason or type(error).__name__) from error

    def socket(self) -> socket.socket | None:
        """That of the open connection."""
        return self._connection.sock if self._connection is not None else None

    def close(self) -> None:
        """Close it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _get(self, path: str) -> tuple[Message, bytes] | None:
        if self._connection is None:
            self._connect()
        status, headers, body = self._ask(path, {})
        if status == 404:
            return None
        if status != 200:
            told = body.decode(errors="replace").strip().partition("\n")[0][:_TOLD]
            raise Refused(f"answers with status {status}" + (f": {told}" if told else ""))
        return headers, body

    def _connect(self) -> None:
        self._connection = http.client.HTTPConnection(*self._address, timeout=self._seconds)
        if self._secret is None:
            if self._ask("/", {})[0] in (401, 403):
                raise Refused("asks for the run's secret: --secret-file FILE (replica.secret_file)")
            return
        handshake = ClientHandshake(self._secret, self._of)
        status, headers, _ = self._ask("/", handshake.first_request())
        if status != 401:
            raise Refused("proves to hold no secret, as --secret-file demands of it")
        status, headers, _ = self._ask("/", handshake.second_request(headers))
        if status not in (200, 404) or handshake.key(headers) is None:
            raise Refused("does not hold the secret of --secret-file, or another one")

    def _ask(self, path: str, headers: Mapping[str, str]) -> tuple[int, Message, bytes]:
        self._connection.request("GET", path, headers=dict(headers))
        answer = self._connection.getresponse()
        return answer.status, answer.headers, answer.read()


def _is_ipv4(host: str) -> bool:
    try:
        return bool(host) and socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0] == socket.AF_INET
    except OSError:
        return False
