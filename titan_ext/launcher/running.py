"""The processes of a run, found below this one by what they were started as, and what they hold."""

import contextlib
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from titan_ext.launcher.processes import descendants

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Processes:
    """Process ids by role."""

    lighthouse: list[int] = field(default_factory=list)
    guards: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Name of the site -> its guards; the lighthouse's is not among them."""
    ranks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Name of the site -> its training processes."""


def running() -> Processes:
    """What runs at this moment."""
    found = Processes()
    started_as = {pid: _arguments(pid) for pid in descendants(os.getpid())}
    for pid, arguments in started_as.items():
        if arguments == started_as.get(_parent(pid)):
            continue  # a fork that has not yet become what it shall be
        module, site = _after("-m", arguments), _after("--site", arguments)
        if module == "titan_ext" and "lighthouse" in arguments:
            found.lighthouse.append(pid)
        elif module == "titan_ext.launcher.guard" and site is not None:
            found.guards[site].append(pid)
        elif module == "titan_ext.train" and site is not None:
            found.ranks[site].append(pid)
    return found


def held(pid: int) -> tuple[int, int] | None:
    """Resident memory in bytes and open descriptors of a process; None if it has ended.

    What the system can read from a file again, such as a library's code, is not memory that the process holds.
    """
    with contextlib.suppress(OSError, IndexError):
        resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
        return (resident - shared) * _PAGE_BYTES, len(os.listdir(f"/proc/{pid}/fd"))
    return None


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _after(flag: str, arguments: list[str]) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments[:-1] else None
