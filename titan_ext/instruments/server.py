"""Serves sites read-only over HTTP: their files to other readers, and the page with its live data to browsers."""

import json
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from titan_ext.instruments.places import FILES, SiteFiles
from titan_ext.replica.authenticated_http import AuthenticatedHandler, AuthenticatedServer
from titan_ext.replica.membership.shared_secret import Secret

OF = "metrics"
"""What is served, as the handshake names it."""

IDENTITY, START = "X-Identity", "X-Start"
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


class RunServer(AuthenticatedServer):
    """Shows what is ``served``; for the rest see ``AuthenticatedServer``."""

    def __init__(self, host: str, port: int, served: Served, secret: Secret | None = None) -> None:
        self.served = served
        super().__init__(host, port, _Handler, of=OF, secret=secret)


class _Handler(AuthenticatedHandler):
    """One connection."""

    server: RunServer

    def answer(self, path: str, query: Mapping[str, list[str]]) -> None:
        """As ``AuthenticatedHandler.answer``."""
        served = self.server.served
        if path == "/sites":
            sites = {name: {"disk": each.disk()} for name, each in served.sites().items()}
            self.send(200, json.dumps(sites).encode(), "application/json")
        elif path.startswith("/sites/"):
            self._send_file(path.removeprefix("/sites/"), query)
        elif path == "/" and served.snapshots is not None:
            self.send(200, page().encode(), "text/html; charset=utf-8")
        elif path == "/events" and served.snapshots is not None:
            self._stream(served.snapshots)
        elif path == "/metrics" and served.openmetrics is not None:
            kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
            self.send(200, served.openmetrics().encode(), kind)
        else:
            self.send(404, b"not served here\n", "text/plain")

    def _send_file(self, path: str, query: Mapping[str, list[str]]) -> None:
        name, _, file = path.rpartition("/")
        found = self.server.served.sites().get(name)
        start = query.get("start", ["0"])[0]
        if found is None or file not in FILES or not start.isdecimal():
            return self.send(404, b"no such file\n", "text/plain")
        try:
            chunk = found.open(file).read(query.get("identity", [None])[0], int(start))
        except OSError as error:
            return self.send(502, f"{error.strerror or error}\n".encode(), "text/plain")
        if chunk is None:
            return self.send(404, b"not there yet\n", "text/plain")
        headers = {IDENTITY: chunk.identity, START: str(chunk.start)}
        self.send(200, chunk.data, "application/octet-stream", headers)

    def _stream(self, snapshots: Callable[[], dict[str, Any]]) -> None:
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
                self.wfile.write(f"data: {json.dumps(snapshots(), separators=(',', ':'))}\n\n".encode())
                self.wfile.flush()
            self.server.stopping.wait(_EVENT_SECONDS)


def page() -> str:
    """The page that shows a run, without data."""
    return files("titan_ext.instruments").joinpath("page.html").read_text(encoding="utf-8")
