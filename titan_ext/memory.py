"""Memory of this process as the operating system counts it, in the words of an accelerator's allocator."""

import ctypes
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path


def _status(key: str) -> int:
    """A size from this process's status, in bytes (``VmRSS``: resident now, ``VmHWM``: at most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def processor_name() -> str:
    """The processor's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"


@dataclass(frozen=True)
class HostProperties:
    """What torchtitan asks of a device."""

    name: str = field(default_factory=processor_name)
    total_memory: int = field(default_factory=_total_memory)
    """Bytes of memory of the machine."""


def memory_stats(device: object = None) -> dict[str, int]:
    """Resident memory under the keys of ``torch.cuda.memory_stats``, in bytes."""
    peak = max(_status("VmHWM"), _status("VmRSS"))
    return {
        "active_bytes.all.peak": peak,
        "reserved_bytes.all.peak": peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def reset_peak() -> None:
    """Let the peak start from what is resident now; without the right to, it stays that of the process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def release_free_memory() -> None:
    """Return to the system what the C library keeps of memory that was freed; takes about a millisecond.

    The library keeps an arena for each of the threads that are busy at a time, and gives back an arena's end at most.
    Where it has no such function this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
