"""Hearing signals beside the main thread, and ceasing to."""

import os
import signal
import threading

from titan_ext.replica.shutdown.process import SignalListener


def test_what_arrives_is_told_with_its_number():
    heard: list[int] = []
    arrived = threading.Event()

    def hear(number: int) -> None:
        heard.append(number)
        arrived.set()

    listener = SignalListener((signal.SIGTERM, signal.SIGINT), hear)
    os.kill(os.getpid(), signal.SIGTERM)
    assert arrived.wait(30)
    listener.stop()
    assert heard == [signal.SIGTERM]


def test_stopping_does_not_wait_for_processes_that_were_forked_meanwhile():
    before = signal.getsignal(signal.SIGTERM)
    listener = SignalListener((signal.SIGTERM,), lambda number: None)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # holds the listener's socket until it is told to end
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    listener.stop()
    assert signal.getsignal(signal.SIGTERM) is before
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child still holds the socket"
    os.close(writing)
    os.waitpid(child, 0)
