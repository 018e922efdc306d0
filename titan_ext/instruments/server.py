"""Serves sites read-only over HTTP: their files to other readers, and the page with its live data to browsers."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from titan_ext.instruments.places import FILES, SiteFiles
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.handshake import ServerHandshake
from titan_ext.replica.state_transfer.sockets import OpenSockets

logger = logging.getLogger(__name__)

PURPOSE = "metrics"
"""Of the handshake: a proof made here proves nothing to the server of shared state, nor the other way round."""

IDENTITY, START = "X-Identity", "X-Start"
_SECONDS = 20.0
"""After which a silent connection is cut."""
_EVENT_SECONDS = 1.0


class Served:
    """What a server shows.

    Args:
        sites: the files of each site, asked for at each request.
        snapshots: the run as the page shows it; None serves no page.
        version: grows whenever a snapshot would be another one.
        openmetrics: the text of ``/metrics``.
    """

    def __init__(
        self,
        sites: Callable[[], Mapping[str, SiteFiles]],
        snapshots: Callable[[], dict[str, Any]] | None = None,
        version: Callable[[], int] = lambda: 0,
        openmetrics: Callable[[], str] | None = None,
    ) -> None:
        self.sites, self.snapshots, self.version, self.openmetrics = sites, snapshots, version, openmetrics


class RunServer(ThreadingHTTPServer):
    """Answers on a thread of its own until it is stopped.

    Args:
        host: address to listen on; empty for all.
        port: 0 takes a free one.
        served: what it shows.
        secret: what clients have to prove to hold; None: everybody is served.

    Raises:
        OSError: it cannot listen there.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, served: Served, secret: Secret | None = None) -> None:
        self.served, self.secret = served, secret
        self.stopping = threading.Event()
        self._open = OpenSockets()
        self.address_family = socket.AF_INET if _is_ipv4(host) else socket.AF_INET6
        super().__init__((host or "::", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=[0.1], daemon=True, name="titan_ext-serve")
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
        # Not HTTPServer's, which looks up the name of the address: for seconds where no name server answers.
        socket.socket.bind(self.socket, self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("metrics server: lost %s", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RunServer
    protocol_version = "HTTP/1.1"
    timeout = _SECONDS
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        secret = self.server.secret
        self._handshake = ServerHandshake(secret, PURPOSE) if secret is not None else None

    def do_GET(self) -> None:
        if self._handshake is not None and not self._authenticate(self._handshake):
            return
        parts = urlsplit(self.path)
        path, served = unquote(parts.path), self.server.served
        if path == "/sites":
            self._send_json({name: {"disk": each.disk()} for name, each in served.sites().items()})
        elif path.startswith("/sites/"):
            self._send_file(path.removeprefix("/sites/"), parse_qs(parts.query))
        elif path == "/" and served.snapshots is not None:
            self._send(200, page().encode(), "text/html; charset=utf-8")
        elif path == "/events" and served.snapshots is not None:
            self._stream()
        elif path == "/metrics" and served.openmetrics is not None:
            text = served.openmetrics().encode()
            self._send(200, text, "application/openmetrics-text; version=1.0.0; charset=utf-8")
        else:
            self._send(404, b"not served here\n", "text/plain")

    def log_message(self, format: str, *args: object) -> None:
        logger.debug("metrics server: " + format, *args)

    def _authenticate(self, handshake: ServerHandshake) -> bool:
        """Whether the client has proven to hold the secret; otherwise the request has been answered."""
        status = handshake.receive(cast("Mapping[str, str]", self.headers))
        if status == 401:
            self._send(status, b"", "text/plain", handshake.response())
        elif status == 403:
            logger.warning("metrics server: %s is refused: it does not hold the run's secret", self.client_address[0])
            self._send(status, b"not the secret of this run (replica.secret_file)\n", "text/plain")
        return status == 200

    def _send_file(self, path: str, query: Mapping[str, list[str]]) -> None:
        name, _, file = path.rpartition("/")
        found = self.server.served.sites().get(name)
        start = query.get("start", ["0"])[0]
        if found is None or file not in FILES or not start.isdecimal():
            return self._send(404, b"no such file\n", "text/plain")
        try:
            chunk = found.open(file).read(query.get("identity", [None])[0], int(start))
        except OSError as error:
            return self._send(502, f"{error.strerror or error}\n".encode(), "text/plain")
        if chunk is None:
            return self._send(404, b"not there yet\n", "text/plain")
        headers = {IDENTITY: chunk.identity, START: str(chunk.start)}
        self._send(200, chunk.data, "application/octet-stream", headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        proof = self._handshake.response() if self._handshake and status == 200 else {}
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **proof, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        """Server-sent events: the run whenever something is new, and the time meanwhile."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        told, at = None, 0.0
        while not self.server.stopping.is_set():
            version, now = self.server.served.version(), time.monotonic()
            # States change with time alone: a site that has fallen silent writes nothing.
            if version != told or now - at > 5 * _EVENT_SECONDS:
                told, at = version, now
                data = json.dumps(self.server.served.snapshots(), separators=(",", ":"))
                self.wfile.write(f"data: {data}\n\n".encode())
                self.wfile.flush()
            self.server.stopping.wait(_EVENT_SECONDS)


def page() -> str:
    """The page that shows a run, without data."""
    return files("titan_ext.instruments").joinpath("page.html").read_text(encoding="utf-8")


def _is_ipv4(host: str) -> bool:
    try:
        return bool(host) and socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0] == socket.AF_INET
    except OSError:
        return False
