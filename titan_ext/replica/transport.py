"""How a joining site gets the members' shared state: over HTTP, in a format that cannot run code."""

import logging
import threading
import urllib.request
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
import socket

from torchft.checkpointing import CheckpointTransport

from titan_ext.replica.address import url_host
from titan_ext.replica.state_format import Message, read_message

logger = logging.getLogger(__name__)


class _Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class StateTransport(CheckpointTransport[Any]):
    """Serves this rank's shared state to the same rank of a joining site.

    Args:
        hostname: name or address under which other sites reach this machine.
        port: port to serve on; 0 takes a free one.
        timeout: how long a transfer may take.
    """

    def __init__(self, hostname: str, port: int, timeout: timedelta) -> None:
        self._hostname = hostname
        self._changed = threading.Condition()
        self._message: Message | None = None
        self._step = -1
        self._readers = 0
        self._timeout = timeout.total_seconds()
        transport = self

        class Handler(BaseHTTPRequestHandler):
            timeout = self._timeout

            def do_GET(self) -> None:
                transport._serve(self)

            def log_message(self, format: str, *args: object) -> None:
                logger.debug("state transport: " + format, *args)

        self._server = _Server(("::", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True, name="titan_ext-state")
        self._thread.start()

    def metadata(self) -> str:
        """The address that a joining site is told."""
        return f"http://{url_host(self._hostname)}:{self._server.server_address[1]}/state/"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Let joining sites fetch ``state_dict``; its tensors must not change until ``disallow_checkpoint``."""
        with self._changed:
            self._message, self._step = Message(state_dict), step
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """Stop serving; returns once no transfer is reading the tensors."""
        with self._changed:
            self._message = None
            self._changed.wait_for(lambda: self._readers == 0, timeout=self._timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch the shared state of a member.

        Raises:
            ValueError: what it sent is malformed.
            OSError: it cannot be reached or stopped answering.
        """
        with urllib.request.urlopen(f"{metadata}{step}", timeout=timeout.total_seconds()) as response:
            return read_message(response, int(response.headers["Content-Length"]))

    def shutdown(self, wait: bool = True) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        if wait:
            self._thread.join()

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        # The joining site may ask before this one has finished its own part of the quorum.
        with self._changed:
            wanted = request.path.removeprefix("/state/")
            ready = self._changed.wait_for(
                lambda: self._message is not None and wanted == str(self._step), timeout=self._timeout
            )
            message = self._message
            self._readers += ready
        if not ready:
            request.send_error(404, "no state for this step")
            return
        try:
            request.send_response(200)
            request.send_header("Content-Type", "application/octet-stream")
            request.send_header("Content-Length", str(message.num_bytes))
            request.end_headers()
            for chunk in message.chunks():
                request.wfile.write(chunk)
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()
