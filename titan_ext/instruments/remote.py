"""Sites behind a server, read over one connection that is kept."""

import json
import threading
from collections.abc import Mapping
from email.message import Message
from typing import Any
from urllib.parse import quote, urlencode

from titan_ext.instruments.lines import Chunk
from titan_ext.instruments.places import SiteFiles, host_and_port
from titan_ext.instruments.server import IDENTITY, OF, START
from titan_ext.replica.authenticated_http import AuthenticatedConnection
from titan_ext.replica.membership.shared_secret import Secret

_SECONDS = 10.0


class RemoteSites:
    """The sites of one server.

    Args:
        url: ``http://host:port``.
        secret: the run's, to prove to the server and to have it proven; None for a server that asks for none.

    Raises:
        UserError: it is no such address.
    """

    def __init__(self, url: str, secret: Secret | None) -> None:
        self._url = url
        self._connection = AuthenticatedConnection(*host_and_port(url), secret, of=OF, seconds=_SECONDS)
        self._lock = threading.Lock()
        self._disks: dict[str, dict[str, float] | None] = {}

    def sites(self) -> Mapping[str, SiteFiles]:
        """As ``Place.sites``."""
        try:
            found = json.loads(self.get("/sites")[1])
            self._disks = {name: _disk(each["disk"]) for name, each in found.items()}
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise OSError(f"{self._url}: no titan_ext site or `titan-ext watch --web` answers there") from error
        return {name: _RemoteSite(self, name) for name in found}

    def disk(self, name: str) -> dict[str, float] | None:
        """Of a site, as its server said last."""
        return self._disks.get(name)

    def get(self, path: str) -> tuple[Message, bytes]:
        """Headers and body of an answer; empty for what is not there.

        Raises:
            OSError: there is no answer, or one that refuses; says why in a line.
        """
        with self._lock:
            try:
                return self._connection.get(path) or (Message(), b"")
            except OSError as error:
                raise OSError(f"{self._url}: {error}") from error


def _disk(told: Any) -> dict[str, float] | None:
    return None if told is None else {key: float(told[key]) for key in ("free", "total")}


class _RemoteSite:
    """One site of a server."""

    def __init__(self, place: RemoteSites, name: str) -> None:
        self._place, self._name = place, name

    def open(self, name: str) -> "_RemoteFile":
        """As ``SiteFiles.open``."""
        return _RemoteFile(self._place, f"/sites/{quote(self._name, safe='')}/{name}")

    def disk(self) -> dict[str, float] | None:
        """As ``SiteFiles.disk``."""
        return self._place.disk(self._name)


class _RemoteFile:
    """One file of it."""

    def __init__(self, place: RemoteSites, path: str) -> None:
        self._place, self._path = place, path

    def read(self, identity: str | None, start: int) -> Chunk | None:
        """As ``Source.read``."""
        query = urlencode({"start": start} | ({"identity": identity} if identity is not None else {}))
        headers, body = self._place.get(f"{self._path}?{query}")
        if IDENTITY not in headers:
            return None
        return Chunk(headers[IDENTITY], int(headers.get(START, "0")), body)
