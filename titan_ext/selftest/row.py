"""A line of the selftest's table."""

from dataclasses import dataclass
from typing import Literal

import torch

Verdict = Literal["ok", "FAILED", "skipped", "measured"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that was tried."""

    part: str
    name: str
    verdict: Verdict
    """"measured" for a figure that has no right value."""
    figure: str = ""
    """What was found, in words."""


def compared(part: str, name: str, found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> Row:
    """The row of a result beside the CPU's.

    Args:
        part: of the table.
        name: of the row.
        found: the device's.
        wanted: the CPU's, of the same shape.
        tolerance: largest difference allowed, in units of the CPU's largest value; 0 wants equal bits.
    """
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    if not torch.isfinite(found).all():
        return Row(part=part, name=name, verdict="FAILED", figure="a NaN or an infinity")
    scale = max(wanted.abs().max().item(), torch.finfo(torch.float32).tiny) if wanted.numel() else 1.0
    off = (found - wanted).abs().max().item() / scale if wanted.numel() else 0.0
    figure = f"off by {off:.1e}, allowed {tolerance:.0e}" if tolerance else f"off by {off:.1e}, equal bits wanted"
    return Row(part=part, name=name, verdict="ok" if off <= tolerance else "FAILED", figure=figure)


def judged(part: str, name: str, holds: bool, figure: str) -> Row:
    """The row of something that is right or wrong."""
    return Row(part=part, name=name, verdict="ok" if holds else "FAILED", figure=figure)
