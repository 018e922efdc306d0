"""What the operating system offers for ending whole process trees (Linux; elsewhere the kernel's help is missing)."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.05


def die_with_parent(death_signal: int = signal.SIGTERM) -> None:
    """Have the kernel send ``death_signal`` to this process when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, int(death_signal))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that ``descendants`` still finds them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """Living processes below ``pid``, parents before children; ended ones that nobody has waited for are left out."""
    children: dict[int, list[tuple[int, bool]]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # The command in parentheses may hold anything, blanks and parentheses too. The process may be gone by now.
        with contextlib.suppress(OSError):
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append((int(entry.parent.name), state not in "ZX"))
    found, queue = [], [pid]
    while queue:
        for child, alive in children.get(queue.pop(0), []):
            queue.append(child)
            found += [child] if alive else []
    return found


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def end_descendants(pid: int, grace_seconds: float) -> bool:
    """End everything below ``pid``: SIGTERM, then SIGKILL after ``grace_seconds``.

    Returns:
        Whether nothing is left; a process stuck in the kernel may outlast SIGKILL.
    """
    for child in descendants(pid):
        send(child, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while descendants(pid) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return kill_descendants(pid)


def kill_descendants(pid: int, timeout_seconds: float = 5.0, spare: Collection[int] = ()) -> bool:
    """SIGKILL everything below ``pid`` until nothing is left, or ``timeout_seconds`` are over: then returns False.

    Args:
        pid: of their ancestor.
        timeout_seconds: a process stuck in the kernel may outlast it.
        spare: processes to leave alone.
    """
    deadline = time.monotonic() + timeout_seconds
    # Once is not enough: a process may fork while the list is read.
    while left := [each for each in descendants(pid) if each not in spare]:
        if time.monotonic() > deadline:
            return False
        for child in left:
            send(child, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return True


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
