"""How the ranks of a site stop together at one inner step when any of them is asked to."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, DistStoreError, TCPStore
from torchtitan.tools.logging import logger

from titan_ext.replica.shutdown.agreed_stop import AgreedStop
from titan_ext.replica.shutdown.process import SignalListener, exit_at_once

# A signal to all processes of a site reaches torchrun as well, which sends it to the ranks once more.
_REPEAT_SECONDS = 2.0
# A rank's thread answers whatever its main thread does; one that does not is dead.
_ANSWER_TIMEOUT = timedelta(seconds=10)
# The longest that a store waits: less than 2**31 milliseconds.
_LONG_TIMEOUT = timedelta(days=20)
_NO_SIGNAL = "none"


class GracefulShutdown:
    """Waits for SIGTERM or SIGINT at any rank of the site and brings all its ranks to an end at one inner step.

    A second signal, or one while there is nothing to save, ends the process at once.

    Args:
        site: the site's name.
        rank: this rank of the site.
        ranks: ranks of the site.
    """

    def __init__(self, site: str, rank: int, ranks: int) -> None:
        self._site, self._rank = site, rank
        self._request_keys = [f"titan_ext/shutdown/request/{index}" for index in range(ranks)]
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Two connections: one waits for a request for as long as the site trains, and a store's client does one
        # thing at a time.
        self._store, self._sending = (TCPStore(*address, is_master=False, wait_for_workers=False) for _ in range(2))
        self.steps = AgreedStop(self._store, "steps", rank, ranks)
        """Inner steps begun; to be advanced before each."""
        self.quorums = AgreedStop(self._store, "quorums", rank, ranks)
        """Quorums asked for."""
        self.answers = AgreedStop(self._store, "answers", rank, ranks)
        """Quorums found."""
        self.code = 0
        """Exit code of the process once it was asked to stop: 128 plus the signal's number."""
        self._is_finished = False
        self._first_signal_at: float | None = None
        self._listener: SignalListener | None = None
        self._thread: threading.Thread | None = None

    def start(self, stop_heartbeats: Callable[[], None], heartbeat_timeout_seconds: float) -> None:
        """Listen from now on; called by the main thread.

        Args:
            stop_heartbeats: stops those of this rank, if it sends the site's.
            heartbeat_timeout_seconds: after so long without heartbeats no quorum counts on this site any more.
        """
        self._thread = threading.Thread(
            target=self._wait_for_request,
            args=[stop_heartbeats, heartbeat_timeout_seconds],
            daemon=True,
            name="titan_ext-shutdown",
        )
        self._thread.start()
        self._listener = SignalListener((signal.SIGTERM, signal.SIGINT), self._on_signal)

    def finish(self) -> None:
        """There is nothing left to save: from now on a request ends the process at once."""
        self._is_finished = True
        if self.code:
            self._exit_at_once("nothing new to save")

    def stop(self) -> None:
        """Listen no more; a site that was asked to stop goes on listening to its end."""
        if self._listener is not None and not self.code:
            self._listener.stop()
            self._listener = None
            with contextlib.suppress(DistError):
                self._sending.set(self._request_keys[self._rank], _NO_SIGNAL)
            self._thread.join()

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self._first_signal_at is None:
            self._first_signal_at, self.code = now, 128 + number
            self._send_to_all_ranks(str(number))
        elif now - self._first_signal_at > _REPEAT_SECONDS:
            self._exit_at_once("asked again")

    def _send_to_all_ranks(self, number: str) -> None:
        try:
            for key in self._request_keys:
                self._sending.set(key, number)
        except DistError:
            self._exit_at_once("the site's store is gone")

    def _wait_for_request(self, stop_heartbeats: Callable[[], None], heartbeat_timeout_seconds: float) -> None:
        try:
            number = self._request()
            if number == _NO_SIGNAL:
                return
            self.code = 128 + int(number)
        except DistError:
            return  # the store ends with the run
        try:
            # The order: while a rank still begins steps it may ask for a quorum, and a quorum that was asked for
            # may still be found.
            if self.steps.close(_ANSWER_TIMEOUT) == 0 or self._is_finished:
                self._exit_at_once("nothing new to save")
            # A quorum that is awaited may still come about, and its members would wait for this site in
            # vain. The lighthouse forgets a site only some time after its last heartbeat.
            self.quorums.close(_ANSWER_TIMEOUT)
            stop_heartbeats()
            time.sleep(heartbeat_timeout_seconds)
            self.answers.close(_ANSWER_TIMEOUT)
        except DistError:
            self._exit_at_once("not all ranks of the site answer")

    def _request(self) -> str:
        """Wait for what a rank writes under this rank's key: a signal's number or ``_NO_SIGNAL``."""
        key = self._request_keys[self._rank]
        while True:
            try:
                self._store.wait([key], _LONG_TIMEOUT)
                return self._store.get(key).decode()
            except DistStoreError:
                continue  # not yet

    def _exit_at_once(self, reason: str) -> None:
        if self._rank == 0:
            logger.info("site %s: asked to leave: %s, leaving", self._site, reason)
        exit_at_once(self.code)
