"""Sites behind a server, read over one connection that is kept."""

import http.client
import json
import threading
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import quote, urlencode

from titan_ext.instruments.lines import Chunk
from titan_ext.instruments.places import SiteFiles, host_and_port
from titan_ext.instruments.server import IDENTITY, PURPOSE, START
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.handshake import ClientHandshake

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
        self._url, self._secret = url, secret
        self._address = host_and_port(url)
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()
        self._disks: dict[str, Any] = {}

    def sites(self) -> Mapping[str, SiteFiles]:
        """As ``Place.sites``."""
        _, body = self.get("/sites")
        try:
            found = json.loads(body)
            self._disks = {name: each["disk"] for name, each in found.items()}
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise OSError(f"{self._url}: no titan_ext site or `titan-ext watch --web` answers there") from error
        return {name: _RemoteSite(self, name) for name in found}

    def disk(self, name: str) -> dict[str, float] | None:
        """Of a site, as its server said last."""
        return self._disks.get(name)

    def get(self, path: str) -> tuple[Mapping[str, str], bytes]:
        """Headers and body of an answer; empty for what is not there.

        Raises:
            OSError: there is no answer, or one that refuses; says why in a line.
        """
        with self._lock:
            try:
                return self._get(path)
            except (http.client.HTTPException, OSError) as error:
                self._close()
                if isinstance(error, Refused):
                    raise
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise OSError(f"{self._url}: {reason or type(error).__name__}") from error

    def _get(self, path: str) -> tuple[Mapping[str, str], bytes]:
        if self._connection is None:
            self._connect()
        answer, body = self._ask(path, {})
        if answer.status == 404:
            return {}, b""
        if answer.status != 200:
            raise Refused(f"{self._url}: {body.decode(errors='replace').strip() or answer.reason}")
        return _headers(answer), body

    def _connect(self) -> None:
        self._connection = http.client.HTTPConnection(*self._address, timeout=_SECONDS)
        if self._secret is None:
            answer, _ = self._ask("/sites", {})
            if answer.status in (401, 403):
                raise Refused(f"{self._url}: asks for the run's secret: --secret-file FILE (replica.secret_file)")
            return
        handshake = ClientHandshake(self._secret, PURPOSE)
        answer, _ = self._ask("/sites", handshake.first_request())
        if answer.status == 200:
            raise Refused(f"{self._url}: proves to hold no secret, as --secret-file demands of it")
        answer, _ = self._ask("/sites", handshake.second_request(_headers(answer)))
        if answer.status != 200 or handshake.key(_headers(answer)) is None:
            raise Refused(f"{self._url}: does not hold the secret of --secret-file, or another one")

    def _ask(self, path: str, headers: Mapping[str, str]) -> tuple[http.client.HTTPResponse, bytes]:
        self._connection.request("GET", path, headers=dict(headers))
        answer = self._connection.getresponse()
        return answer, answer.read()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _headers(answer: http.client.HTTPResponse) -> Mapping[str, str]:
    return cast("Mapping[str, str]", answer.headers)  # whose names are found in any case


class Refused(OSError):
    """The server answers, and not with what was asked for."""


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
