"""What is said while a quorum takes its time: that the lighthouse has gone, that it is back, who is missing."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

from titan_ext.replica.address import is_listening

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_REMINDER_SECONDS = 30.0


class QuorumWatch:
    """Looks after the lighthouse from a thread of its own for as long as the context lasts.

    Args:
        lighthouse: its URL.
        waiting_for: what the site waits for while the lighthouse is there.
    """

    def __init__(self, lighthouse: str, waiting_for: Callable[[], str]) -> None:
        self._lighthouse = lighthouse
        self._waiting_for = waiting_for
        self._over = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="titan_ext-watch")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None:
            self._notice(lost=False)

    def _watch(self) -> None:
        started = reminded = time.monotonic()
        while not self._over.wait(_POLL_SECONDS):
            self._notice(lost=not is_listening(self._lighthouse))
            now = time.monotonic()
            if now - reminded >= _REMINDER_SECONDS:
                reminded = now
                what = "the lighthouse does not answer" if self._lost else self._waiting_for()
                logger.info("%.0f s in the quorum: %s", now - started, what)

    def _notice(self, *, lost: bool) -> None:
        if lost and not self._lost:
            logger.warning("the lighthouse at %s has gone; the site waits until it is back", self._lighthouse)
        elif self._lost and not lost:
            logger.warning("the lighthouse at %s is back", self._lighthouse)
        self._lost = lost
