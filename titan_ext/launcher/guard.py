"""A process between the launcher and a site that ends with the site, and ends all processes of the site with it.

torchrun starts each rank in a session of its own, so no signal to a process group reaches them, and
they outlive a torchrun that is killed. The guard adopts whatever loses its parent and ends everything
below itself when the command ends. When it is told to stop, or when the launcher is gone (even by
SIGKILL), it tells the command first, and only that: torchrun tells the ranks, which save and leave.

It also stands between them and their log: on a full disk a line that cannot be written ends the process that writes it
(torchft's threads panic), and so they write to the guard, which drops it.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from titan_ext.launcher.processes import adopt_orphans, die_with_parent, end_descendants, send

_POLL_SECONDS = 0.1
_CHUNK_BYTES = 64 * 1024
_LAST_LINES_SECONDS = 5.0  # for what the processes have written before they ended


def guarded(command: Sequence[str], grace_seconds: float) -> list[str]:
    """The command line that runs ``command`` under a guard that ends with the calling process."""
    guard = [sys.executable, "-m", "titan_ext.launcher.guard", "--parent", str(os.getpid())]
    return [*guard, "--grace-seconds", str(grace_seconds), "--", *command]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command under guard; returns its exit code, 128 plus the number of a signal that ended it."""
    parser = argparse.ArgumentParser(prog="python -m titan_ext.launcher.guard", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process id of the launcher")
    parser.add_argument("--grace-seconds", type=float, required=True, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)

    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: stops.append(received))
    adopt_orphans()
    die_with_parent()
    if os.getppid() != options.parent:
        return 128 + signal.SIGTERM  # the launcher ended before the kernel was told to report that
    child = subprocess.Popen(
        options.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=die_with_parent
    )
    log = threading.Thread(target=pass_on, args=(child.stdout, sys.stdout.fileno()), daemon=True)
    log.start()
    while child.poll() is None and not stops:
        time.sleep(_POLL_SECONDS)
    code = child.returncode
    deadline = time.monotonic() + options.grace_seconds
    if code is None:
        send(child.pid, signal.SIGTERM)
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    end_descendants(os.getpid(), deadline - time.monotonic())
    log.join(_LAST_LINES_SECONDS)
    if code is None:
        return 128 + stops[0]
    return 128 - code if code < 0 else code


def pass_on(output: IO[bytes], log: int) -> None:
    """Copy what processes write into their log until the last of them has ended; what that has no room for is left out.

    Args:
        output: of the processes.
        log: the descriptor of the file.
    """
    lost = 0
    while data := os.read(output.fileno(), _CHUNK_BYTES):
        note = f"\n[{lost} bytes are missing here: the log could not be written]\n".encode() if lost else b""
        try:
            lost = len(note + data) - os.write(log, note + data)
        except OSError:
            lost += len(data)


if __name__ == "__main__":
    sys.exit(main())
