"""Logs while a quorum takes its time: that the lighthouse has gone, that it is back, what the site waits for."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from titan_ext.replica.address import is_listening

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_REMINDER_SECONDS = 30.0


class QuorumLog:
    """Checks on the lighthouse from a thread of its own for as long as the context lasts.

    Args:
        lighthouse: its URL.
        waiting_for: what the site waits for while the lighthouse is there.
    """

    def __init__(self, lighthouse: str, waiting_for: Callable[[], str]) -> None:
        self._lighthouse = lighthouse
        self._waiting_for = waiting_for
        self._finished = threading.Event()
        self._is_lost = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="titan_ext-quorum-log")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        if error is None:
            self._log_change(is_lost=False)

    def _run(self) -> None:
        started = reminded = time.monotonic()
        while not self._finished.wait(_POLL_SECONDS):
            self._log_change(is_lost=not is_listening(self._lighthouse))
            now = time.monotonic()
            if now - reminded >= _REMINDER_SECONDS:
                reminded = now
                reason = "the lighthouse does not answer" if self._is_lost else self._waiting_for()
                logger.info("%.0f s in the quorum: %s", now - started, reason)

    def _log_change(self, *, is_lost: bool) -> None:
        if is_lost and not self._is_lost:
            logger.warning("the lighthouse at %s has gone; the site waits until it is back", self._lighthouse)
        elif self._is_lost and not is_lost:
            logger.warning("the lighthouse at %s is back", self._lighthouse)
        self._is_lost = is_lost
