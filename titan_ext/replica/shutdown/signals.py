"""Hearing of a signal while the main thread is busy outside Python."""

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType


class SignalListener:
    """Calls ``heard`` with the number of each of ``signals`` that arrives, on a thread of its own.

    Python runs a signal's handler between two instructions of the main thread, which may be in a
    collective for minutes; the descriptor that the interpreter writes to is served at once.
    Built and stopped by the main thread.
    """

    def __init__(self, signals: tuple[signal.Signals, ...], heard: Callable[[int], None]) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._before_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _leave_to_the_thread) for number in signals}
        self._thread = threading.Thread(target=self._listen, args=[heard], daemon=True, name="titan_ext-signals")
        self._thread.start()

    def stop(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_descriptor)
        # Closing would not end the other side's reading: processes that were forked meanwhile hold the socket too.
        self._sender.shutdown(socket.SHUT_WR)
        self._thread.join()
        self._sender.close()
        self._receiver.close()

    def _listen(self, heard: Callable[[int], None]) -> None:
        while numbers := self._receiver.recv(64):
            for number in numbers:
                if number in self._before:
                    heard(number)


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass
