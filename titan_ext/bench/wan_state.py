"""One site of the wide-area benchmark: it gives its shared state to another one, or takes it."""

import time
from datetime import timedelta

import torch

from titan_ext.replica.state_transfer.transport import StateTransport

_TIMEOUT = timedelta(seconds=600)
_STEP = 1


class StateSite:
    """Site 0 offers a state of random bytes, site 1 fetches it.

    Args:
        site: index of this site.
        address: at which the other one reaches it.
        num_bytes: size of the state.
    """

    def __init__(self, site: int, address: str, num_bytes: int) -> None:
        self._site = site
        self._transport = StateTransport(address, 0, _TIMEOUT)
        if site == 0:
            values = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
            self._transport.send_checkpoint([1], _STEP, {"values": values}, _TIMEOUT)

    def url(self) -> str:
        """Where site 0 serves its state."""
        return self._transport.metadata()

    def fetch(self, url: str) -> float:
        """Seconds until site 1 has the state of ``url``, checked; 0 at the other site."""
        if self._site == 0:
            return 0.0
        started = time.perf_counter()
        self._transport.recv_checkpoint(0, url, _STEP, _TIMEOUT)
        return time.perf_counter() - started
