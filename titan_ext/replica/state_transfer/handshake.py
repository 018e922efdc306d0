"""How both ends of a connection that serves shared state prove to hold the secret.

The first request brings the client's nonce and is answered 401 with the server's. The next one
brings the client's proof, over both; its answer carries the server's proof, over both. Either end
drops the connection where that of the other is missing or wrong. From then on the connection has a
key of its own, with which each chunk's digest is made.
"""

import logging
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler

from titan_ext.replica.membership.shared_secret import Secret, fresh_nonce

logger = logging.getLogger(__name__)

_NONCE, _PROOF = "X-Nonce", "X-Proof"
_CLIENT, _SERVER, _CHUNKS = "client of state", "server of state", "chunks of state"


class Client:
    """The end that fetches, for one connection."""

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._words = (fresh_nonce(), "")

    def greeting(self) -> dict[str, str]:
        """Headers of the first request."""
        return {_NONCE: self._words[0]}

    def answer(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers of the second request, from those that answered the first."""
        self._words = (self._words[0], headers.get(_NONCE, ""))
        return {_PROOF: self._secret.proof(_CLIENT, *self._words)}

    def key(self, headers: Mapping[str, str]) -> bytes | None:
        """The connection's key, from the headers that answered the second request; None without the server's proof."""
        if not self._secret.proves(headers.get(_PROOF), _SERVER, *self._words):
            return None
        return self._secret.key(_CHUNKS, *self._words)


class Server:
    """The end that serves, for one connection."""

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._words: tuple[str, str] | None = None
        self.key: bytes | None = None
        """Set once the client has proven itself."""

    def listen(self, headers: Mapping[str, str]) -> int:
        """Take in a request: 200 for a client that is admitted, 401 for one that has to prove itself, else 403."""
        if self.key is not None:
            return 200
        if self._words is None:
            if _NONCE not in headers:
                return 403
            self._words = (headers[_NONCE], fresh_nonce())
            return 401
        if not self._secret.proves(headers.get(_PROOF), _CLIENT, *self._words):
            return 403
        self.key = self._secret.key(_CHUNKS, *self._words)
        return 200

    def headers(self) -> dict[str, str]:
        """What the answer carries: the nonce, or the proof for a client that has proven itself."""
        if self.key is None:
            return {_NONCE: self._words[1]}
        return {_PROOF: self._secret.proof(_SERVER, *self._words)}


def admit(request: BaseHTTPRequestHandler, introduction: Server) -> bool:
    """Whether the client of a request has proven to hold the secret; otherwise the request has been answered."""
    status = introduction.listen(request.headers)
    if status == 401:
        request.send_response(status)
        for name, value in {**introduction.headers(), "Content-Length": "0"}.items():
            request.send_header(name, value)
        request.end_headers()
    elif status == 403:
        logger.warning(
            "state transport: %s is refused: it does not hold this site's secret (replica.secret_file)",
            request.client_address[0],
        )
        request.send_error(status, "not the secret of this site")
    return status == 200
