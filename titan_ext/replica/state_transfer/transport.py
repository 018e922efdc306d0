"""torchft's interface to the transfer of shared state: over HTTP, in a format that cannot run code."""

from datetime import timedelta
from typing import Any

from torchft.checkpointing import CheckpointTransport

from titan_ext.replica.address import url_host
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.replica.state_transfer.chunks import CHUNK_BYTES, LATEST, ROOT
from titan_ext.replica.state_transfer.fetch import fetch_state
from titan_ext.replica.state_transfer.offers import StateOffers
from titan_ext.replica.state_transfer.server import StateServer
from titan_ext.replica.state_transfer.tls import Tls
from titan_ext.replica.streams.pace import Pace
from titan_ext.replica.torchft_internals import state_step


class StateTransport(CheckpointTransport[Any]):
    """Gives this rank's shared state to the same rank of a joining site, and fetches that of a member.

    Args:
        hostname: name or address under which other sites reach this machine.
        port: port to serve on; 0 takes a free one.
        timeout: how long a request waits for the state, how long it may then take, and how long
            ``disallow_checkpoint`` waits for it.
        tls: certificates for both directions; None: plain HTTP.
        secret: what both ends prove to hold; None: everybody is served.
        streams: connections over which a state is fetched; 0: as many as the distance asks for.
        chunk_bytes: size of the pieces that are checked and, after a failure, fetched again.
        pace: what serving a state is held to.
    """

    def __init__(
        self,
        hostname: str,
        port: int,
        timeout: timedelta,
        *,
        tls: Tls | None = None,
        secret: Secret | None = None,
        streams: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
        pace: Pace | None = None,
    ) -> None:
        self._timeout = timeout.total_seconds()
        self._tls = tls
        self._secret = secret
        self._streams = streams
        self._prefetched: Any = None
        self.offers = StateOffers(self._timeout, chunk_bytes)
        """What this rank serves."""
        context = None if tls is None else tls.server
        self._server = StateServer(port, self.offers, self._timeout, context, secret, pace or Pace(0.0))
        scheme = "http" if tls is None else "https"
        self._url = f"{scheme}://{url_host(hostname)}:{self._server.port}{ROOT}"

    # -- offering ----------------------------------------------------------------------------

    def metadata(self) -> str:
        """The URL under which a joining site fetches the state."""
        return self._url

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Let joining sites fetch ``state_dict``; its tensors must not change until ``disallow_checkpoint``."""
        self.offers.publish(step, state_dict)

    def disallow_checkpoint(self) -> None:
        """Stop serving; returns once no connection reads the tensors, and cuts those that do for too long."""
        self.offers.withdraw()

    @property
    def frame_bytes_sent(self) -> int:
        """Bytes of frames sent over connections that have ended, as the kernel tells."""
        return self._server.frame_bytes_sent

    # -- fetching ----------------------------------------------------------------------------

    def prefetch(self, metadata: str) -> None:
        """Fetch a snapshot of a member's state, for ``recv_checkpoint`` to return if the member has not moved on.

        Raises:
            ValueError, OSError: as ``recv_checkpoint``.
        """
        self._prefetched = self._fetch(metadata, LATEST, self._timeout)

    def drop_prefetched(self) -> None:
        """Free a snapshot that was fetched and not needed."""
        self._prefetched = None

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch the shared state of a member.

        Raises:
            ValueError: what it sent is malformed or damaged again and again.
            OSError: it cannot be reached, refuses or stopped answering; TimeoutError after ``timeout``.
        """
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and state_step(prefetched) == step:
            return prefetched
        return self._fetch(metadata, step, timeout.total_seconds())

    def _fetch(self, metadata: str, step: int, seconds: float) -> Any:
        context = None if self._tls is None else self._tls.client
        return fetch_state(metadata, step, timeout=seconds, streams=self._streams, context=context, secret=self._secret)

    def shutdown(self, wait: bool = True) -> None:
        """Stop the server and cut its connections."""
        # First the offers: connections that wait for one would keep their threads.
        self.offers.close()
        self._server.stop(wait)
