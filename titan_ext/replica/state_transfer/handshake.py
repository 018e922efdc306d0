"""How both ends of a connection that serves shared state prove to hold the secret.

The first request brings the client's nonce and is answered 401 with the server's. The second one
brings the client's proof, over both; its answer carries the server's proof, over both. Either end
drops the connection where that of the other is missing or wrong. From then on the connection has a
key of its own, with which each chunk's digest is made.
"""

from email.message import Message

from titan_ext.replica.membership.shared_secret import Secret, fresh_nonce

_NONCE, _PROOF = "X-Nonce", "X-Proof"


class ClientHandshake:
    """The end that fetches, for one connection.

    Args:
        secret: to prove.
        of: what is served; a proof for one thing is none for another.
    """

    def __init__(self, secret: Secret, of: str = "state") -> None:
        self._secret, self._of = secret, of
        self._nonces = (fresh_nonce(), "")

    def first_request(self) -> dict[str, str]:
        """Headers of the first request."""
        return {_NONCE: self._nonces[0]}

    def second_request(self, headers: Message) -> dict[str, str]:
        """Headers of the second request, from those that answered the first."""
        self._nonces = (self._nonces[0], headers.get(_NONCE, ""))
        return {_PROOF: self._secret.proof(f"client of {self._of}", *self._nonces)}

    def key(self, headers: Message) -> bytes | None:
        """The connection's key, from the headers that answered the second request; None without the server's proof."""
        if not self._secret.proves(headers.get(_PROOF), f"server of {self._of}", *self._nonces):
            return None
        return self._secret.key(f"chunks of {self._of}", *self._nonces)


class ServerHandshake:
    """The end that serves, for one connection.

    Args:
        secret: to have proven.
        of: what is served.
    """

    def __init__(self, secret: Secret, of: str = "state") -> None:
        self._secret, self._of = secret, of
        self._nonces: tuple[str, str] | None = None
        self.key: bytes | None = None
        """Set once the client has proven itself."""

    def receive(self, headers: Message) -> int:
        """Check a request: 200 for a client that is authenticated, 401 for one that has to prove itself, else 403."""
        if self.key is not None:
            return 200
        if self._nonces is None:
            if _NONCE not in headers:
                return 403
            self._nonces = (headers[_NONCE], fresh_nonce())
            return 401
        if not self._secret.proves(headers.get(_PROOF), f"client of {self._of}", *self._nonces):
            return 403
        self.key = self._secret.key(f"chunks of {self._of}", *self._nonces)
        return 200

    def response(self) -> dict[str, str]:
        """Headers of the response: the nonce, or the proof for a client that has proven itself."""
        if self.key is None:
            return {_NONCE: self._nonces[1]}
        return {_PROOF: self._secret.proof(f"server of {self._of}", *self._nonces)}
