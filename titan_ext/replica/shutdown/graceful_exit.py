"""Ending a rank's process."""

import contextlib
import os
import sys
from typing import NoReturn


class Left(SystemExit):
    """The site was asked to leave and has done so; ``code`` is 128 plus the number of the signal that asked."""


def exit_at_once(code: int) -> NoReturn:
    """End the process: other ranks may be in a collective, and torchft's threads are not ours to join."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
