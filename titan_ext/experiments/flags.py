"""Checks of the flags that several benchmarks have."""

import math
import os

from titan_ext.errors import UserError


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raises UserError, naming the flag, its value and what is allowed, unless that holds."""
    if not holds:
        raise UserError(f"--{key.replace('_', '-')} {value}: must be {allowed}")


def learning_rates(text: str) -> list[float]:
    """The comma-separated numbers of ``--learning-rates``, ascending and distinct.

    Raises:
        UserError: one is no number above 0.
    """
    try:
        grid = sorted({float(each) for each in text.split(",")})
    except ValueError:
        grid = []
    fine = bool(grid) and all(0 < each < math.inf for each in grid)
    require(fine, "learning_rates", text, "numbers above 0, such as 1e-3,2e-3")
    return grid


def check_device(device: str) -> None:
    """Raises UserError if this machine lacks the device."""
    import torch

    found = ["cpu"]
    if torch.accelerator.is_available():
        found.append(torch.accelerator.current_accelerator().type)
    require(device in found, "device", device, f"of {', '.join(found)} on this machine")


def workers_and_threads(workers: int | None, device: str) -> tuple[int, int]:
    """Runs side by side (by default one for each core; one off the CPU), and the threads of each."""
    cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    count = workers or cores
    return count, max(1, cores // count)
