"""What a comparison with somebody else's code came to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

Outcome = Literal["holds", "differs", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the report."""

    part: str
    name: str
    outcome: Outcome
    detail: str
    """What was compared and how far apart it is; of a skipped one, why."""


@dataclass(frozen=True, slots=True)
class Part:
    """Checks against one package.

    Args:
        needs: modules without which it is skipped, each with the package that has it.
        run: makes the checks; gets the part's name.
    """

    needs: dict[str, str]
    run: Callable[[str], Iterable[Check]]


def checks_of(name: str, part: Part) -> list[Check]:
    """The checks of a part, or the one line that says why they were skipped."""
    missing = [package for module, package in part.needs.items() if find_spec(module) is None]
    if missing:
        detail = f"not installed: pip install {' '.join(missing)}"
        return [Check(part=name, name="all", outcome="skipped", detail=detail)]
    try:
        return list(part.run(name))
    except ImportError as error:  # of what the package itself lacks
        return [Check(part=name, name="all", outcome="skipped", detail=f"cannot be imported: {error}")]


def close(part: str, name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-6) -> Check:
    """Whether two results are as near as arithmetic allows.

    Args:
        part: the check's.
        name: the check's.
        ours: any shape.
        theirs: of the same shape.
        tolerance: largest difference, relative to the largest of theirs.
    """
    apart = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    outcome: Outcome = "holds" if apart <= tolerance else "differs"
    return Check(
        part=part, name=name, outcome=outcome, detail=f"apart by {apart:.2g} of the largest; allowed {tolerance:g}"
    )
