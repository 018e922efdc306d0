"""Keeps the terminal view up to date, and takes keys."""

import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live

from titan_ext.instruments.plot import AXES
from titan_ext.instruments.terminal import draw


def show(take: Callable[[], dict[str, Any]], seconds: float) -> None:
    """Draw what ``take`` returns, again every so many seconds, until the user presses q.

    Raises:
        KeyboardInterrupt: Ctrl-C; the terminal is as before.
    """
    console, axes = Console(highlight=False), list(AXES)
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(draw(take(), console, axes[0]), refresh=True)
            key = pressed(seconds)
            if key in ("q", "Q"):
                return
            if key in ("x", "X"):
                axes = [*axes[1:], axes[0]]


@contextmanager
def _keys() -> Iterator[Callable[[float], str | None]]:
    """Waits so many seconds for a key, and returns it; without a keyboard it only waits."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield lambda seconds: sys.stdin.read(1) if select.select([sys.stdin], [], [], seconds)[0] else None
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
