"""How the ranks of a site come to leave together when any of them is told to."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, DistStoreError, TCPStore
from torchtitan.tools.logging import logger

from titan_ext.replica.shutdown.agreed_stop import CommonLimit
from titan_ext.replica.shutdown.graceful_exit import exit_at_once
from titan_ext.replica.shutdown.signals import SignalListener

# Whoever tells all processes of a site tells torchrun as well, which tells the ranks once more.
_ECHO_SECONDS = 2.0
# A rank's thread answers whatever its main thread does; one that does not is dead.
_PATIENCE = timedelta(seconds=10)
# A store waits for less than 2**31 milliseconds.
_LONG = timedelta(days=20)
_NOTHING = "nothing"


class Departure:
    """Waits for SIGTERM or SIGINT at any rank of the site and brings all its ranks to an end at one inner step.

    A second signal, or one while there is nothing to save, ends the process at once.

    Args:
        site: the site's name.
        rank: this rank of the site.
        ranks: ranks of the site.
    """

    def __init__(self, site: str, rank: int, ranks: int) -> None:
        self._site, self._rank = site, rank
        self._wake_keys = [f"titan_ext/shutdown/wake/{each}" for each in range(ranks)]
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # One connection to wait on, one to tell the others with meanwhile.
        self._store, self._telling = (TCPStore(*address, is_master=False, wait_for_workers=False) for _ in range(2))
        self.steps = CommonLimit(self._store, "steps", rank, ranks)
        """Inner steps begun; to be advanced before each."""
        self.quorums = CommonLimit(self._store, "quorums", rank, ranks)
        """Quorums asked for."""
        self.answers = CommonLimit(self._store, "answers", rank, ranks)
        """Quorums found."""
        self.code = 0
        """Exit code of the process once it was asked to leave: 128 plus the signal's number."""
        self._finished = False
        self._heard_at: float | None = None
        self._listener: SignalListener | None = None
        self._awaiting: threading.Thread | None = None

    def start(self, fall_silent: Callable[[], None], silence_seconds: float) -> None:
        """Listen from now on; called by the main thread.

        Args:
            fall_silent: stops the heartbeats of this rank, if it sends the site's.
            silence_seconds: after so long without heartbeats no quorum counts on this site any more.
        """
        self._awaiting = threading.Thread(
            target=self._await_request, args=[fall_silent, silence_seconds], daemon=True, name="titan_ext-departure"
        )
        self._awaiting.start()
        self._listener = SignalListener((signal.SIGTERM, signal.SIGINT), self._hear)

    def finish(self) -> None:
        """There is nothing left to save: from now on a request ends the process at once."""
        self._finished = True
        if self.code:
            self._leave_at_once("nothing new to save")

    def stop(self) -> None:
        """Listen no more; a site that leaves goes on listening to its end."""
        if self._listener is not None and not self.code:
            self._listener.stop()
            self._listener = None
            with contextlib.suppress(DistError):
                self._telling.set(self._wake_keys[self._rank], _NOTHING)
            self._awaiting.join()

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self._heard_at is None:
            self._heard_at, self.code = now, 128 + number
            self._tell_all(str(number))
        elif now - self._heard_at > _ECHO_SECONDS:
            self._leave_at_once("asked again")

    def _tell_all(self, number: str) -> None:
        try:
            for key in self._wake_keys:
                self._telling.set(key, number)
        except DistError:
            self._leave_at_once("the site's store is gone")

    def _await_request(self, fall_silent: Callable[[], None], silence_seconds: float) -> None:
        try:
            number = self._woken_by()
            if number == _NOTHING:
                return
            self.code = 128 + int(number)
        except DistError:
            return  # the store ends with the run
        try:
            if self.steps.close(_PATIENCE) == 0 or self._finished:
                self._leave_at_once("nothing new to save")
            # A quorum that is awaited may still come about, and its members would wait for this site in
            # vain. The lighthouse forgets a site only some time after its last heartbeat.
            self.quorums.close(_PATIENCE)
            fall_silent()
            time.sleep(silence_seconds)
            self.answers.close(_PATIENCE)
        except DistError:
            self._leave_at_once("not all ranks of the site answer")

    def _woken_by(self) -> str:
        key = self._wake_keys[self._rank]
        while True:
            try:
                self._store.wait([key], _LONG)
                return self._store.get(key).decode()
            except DistStoreError:
                continue  # not yet

    def _leave_at_once(self, why: str) -> None:
        if self._rank == 0:
            logger.info("site %s: asked to leave: %s, leaving", self._site, why)
        exit_at_once(self.code)
