"""The secret that the sites of a run share, and proofs of holding it.

A proof is an HMAC-SHA256 over the fresh nonces of both ends and what is to be believed, so that it
holds for this exchange only; the secret itself never travels.
"""

import hmac
import secrets
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

from titan_ext.errors import UserError

_MIN_BYTES = 16


class Secret:
    """A secret of the run's sites, as key of the HMACs."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def key(self, purpose: str, *parts: str) -> bytes:
        """32 bytes that only a holder can derive from ``parts``; they differ by ``purpose``."""
        mac = hmac.new(self._value, digestmod=sha256)
        for part in (purpose, *parts):
            encoded = part.encode(errors="surrogatepass")  # those that come from a peer may hold anything
            # With their lengths, or ("ab", "c") would be the same as ("a", "bc").
            mac.update(len(encoded).to_bytes(8, "big") + encoded)
        return mac.digest()

    def proof(self, purpose: str, *parts: str) -> str:
        """A proof of holding the secret, as hexadecimal digits."""
        return self.key(purpose, *parts).hex()

    def proves(self, proof: Any, purpose: str, *parts: str) -> bool:
        """Whether ``proof``, anything a peer may have sent, is that of a holder."""
        if not isinstance(proof, str):
            return False
        return hmac.compare_digest(proof.encode(errors="replace"), self.proof(purpose, *parts).encode())


NO_SECRET = Secret(b"")
"""Where none is set: everybody holds it."""


def fresh_nonce() -> str:
    """128 random bits as hexadecimal digits."""
    return secrets.token_hex(16)


def load_secret(path: str | None, flag: str = 'replica.secret_file = "{path}"') -> Secret | None:
    """The secret in a file, without the white space around it; None if there is no path.

    Args:
        path: of the file.
        flag: what errors begin with.

    Raises:
        UserError: the file cannot be read, holds too little, or is open to others on this machine.
    """
    if path is None:
        return None
    setting = flag.format(path=path)
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        value = Path(path).read_bytes().strip()
    except OSError as error:
        raise UserError(f"{setting}: cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise UserError(f"{setting}: other users of this machine may open it (mode {mode:o}): chmod 600 it")
    if len(value) < _MIN_BYTES:
        raise UserError(f"{setting}: holds {len(value)} bytes, must hold {_MIN_BYTES} at least (openssl rand -hex 32)")
    return Secret(value)
