"""A rank's process: how it notices a signal, and how it exits."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


class GracefulExit(SystemExit):
    """The site was asked to stop and has done so; ``code`` is 128 plus the number of the signal that asked."""


def exit_at_once(code: int) -> NoReturn:
    """End the process without joining threads: some are torchft's, and other ranks may be in a collective."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class SignalListener:
    """Calls ``on_signal`` with the number of each of ``signals`` that arrives, on a thread of its own.

    Python runs a signal's handler between two instructions of the main thread, which may be in a
    collective for minutes; the descriptor that the interpreter writes to is read at once.
    Built and stopped by the main thread.
    """

    def __init__(self, signals: tuple[signal.Signals, ...], on_signal: Callable[[int], None]) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._previous_handlers = {number: signal.signal(number, _ignore) for number in signals}
        self._thread = threading.Thread(target=self._run, args=[on_signal], daemon=True, name="titan_ext-signals")
        self._thread.start()

    def stop(self) -> None:
        """Restore the handlers of before."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        # Closing would not end the other side's reading: processes that were forked meanwhile hold the socket too.
        self._sender.shutdown(socket.SHUT_WR)
        self._thread.join()
        self._sender.close()
        self._receiver.close()

    def _run(self, on_signal: Callable[[int], None]) -> None:
        while numbers := self._receiver.recv(64):
            for number in numbers:
                if number in self._previous_handlers:
                    on_signal(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """For the thread to act on. Not ``SIG_IGN``: with that the interpreter would write nothing."""
