"""What both ends of a transfer agree on: a message cut into chunks, each followed by its digest.

``GET /state/<step>/<first>-<last>`` answers with the chunks ``first`` to ``last``, each followed by
its SHA-256. Digests that travel with the bytes are computed while these are read: neither end holds
the message or a list of digests. The headers of every answer describe the whole message; its
``ETag`` names one offer of one member and goes back as ``If-Match``, so that a transfer never mixes
two offers of one step. Between sites with a secret a digest is an HMAC with the connection's key.
"""

import hashlib
import hmac
import re
from dataclasses import dataclass
from email.message import Message
from typing import Any

CHUNK_BYTES = 8 * 2**20
ROOT = "/state/"
LATEST = 10**18 - 1
"""In place of a step: a snapshot of the member's state, which contains the step that it is of."""
DIGEST_BYTES = hashlib.sha256().digest_size

_MAX_CHUNK_BYTES = 64 * 2**20
_MAX_BYTES = 2**50
_REQUEST = re.compile(rf"{ROOT}(\d{{1,18}})/(\d{{1,18}})-(\d{{1,18}})", re.ASCII)
_TAG = re.compile(r'"[0-9a-f]{32}"', re.ASCII)


@dataclass(frozen=True)
class MessageInfo:
    """Identity and sizes of one offered message.

    Args:
        tag: names the offer; an HTTP entity tag with its quotes.
        num_bytes: size of the message.
        chunk_bytes: size of every chunk but the last.
    """

    tag: str
    num_bytes: int
    chunk_bytes: int

    @classmethod
    def from_headers(cls, headers: Message) -> "MessageInfo":
        """Raises ValueError if the headers of an answer do not describe a message."""
        tag = headers.get("ETag", "")
        sizes = [headers.get(name, "") for name in ("X-State-Bytes", "X-Chunk-Bytes")]
        if not _TAG.fullmatch(tag) or not all(re.fullmatch("[0-9]{1,18}", size) for size in sizes):
            raise ValueError(f"an answer without ETag, X-State-Bytes or X-Chunk-Bytes ({[tag, *sizes]})")
        num_bytes, chunk_bytes = map(int, sizes)
        if not 0 < num_bytes <= _MAX_BYTES or not 0 < chunk_bytes <= _MAX_CHUNK_BYTES:
            raise ValueError(f"a message of {num_bytes} bytes in chunks of {chunk_bytes}")
        return cls(tag, num_bytes, chunk_bytes)

    def headers(self) -> dict[str, str]:
        return {"ETag": self.tag, "X-State-Bytes": str(self.num_bytes), "X-Chunk-Bytes": str(self.chunk_bytes)}

    @property
    def num_chunks(self) -> int:
        return -(-self.num_bytes // self.chunk_bytes)

    def span(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk and the one behind its last."""
        start = chunk * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.num_bytes)

    def answer_bytes(self, first: int, last: int) -> int:
        """Size of an answer: the chunks ``first`` to ``last`` with their digests."""
        return self.span(last)[1] - self.span(first)[0] + (last - first + 1) * DIGEST_BYTES


def chunk_digest(key: bytes | None, step: int, info: MessageInfo, chunk: int) -> Any:
    """A hashlib object for the bytes of one chunk; with a key it also covers which chunk of which message they are."""
    if key is None:
        return hashlib.sha256()
    position = f"{step} {info.tag} {info.num_bytes} {info.chunk_bytes} {chunk} "
    return hmac.new(key, position.encode(), hashlib.sha256)


def request_path(step: int, first: int, last: int) -> str:
    """The path below ``ROOT`` under which chunks are asked for."""
    return f"{step}/{first}-{last}"


def parse_path(path: str) -> tuple[int, int, int] | None:
    """Step, first and last chunk; None if it is no such path."""
    match = _REQUEST.fullmatch(path)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None
