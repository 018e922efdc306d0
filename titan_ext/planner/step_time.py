"""How long an inner step takes, from what the user knows of it."""

from collections.abc import Sequence
from typing import Any

from titan_ext.config.model import parameter_shapes
from titan_ext.errors import UserError
from titan_ext.planner.by_site import seconds_by_site
from titan_ext.planner.range import Range

_FLOPS = {"gflops": 1e9, "tflops": 1e12, "pflops": 1e15}
ASSUMED_FLOPS = 400e12
"""A second and rank where nothing is known: 40 % of an H100's peak in bfloat16."""


def tokens_per_step(site: Any) -> int:
    """Tokens that all ranks of a site train on in an inner step."""
    training = site.config.training
    batch = training.global_batch_size
    return int(training.seq_len * (batch if batch > 0 else training.local_batch_size * site.layout.batch))


def step_from_flops(site: Any, flops: float) -> float:
    """Seconds of a step in which every rank does ``flops`` operations a second: 6 for each parameter and token."""
    parameters = sum(shape.numel() for shape in parameter_shapes(site.config).values())
    return 6 * parameters * tokens_per_step(site) / (flops * site.layout.ranks)


def parse_flops(text: str) -> float:
    """Operations a second from ``400tflops``.

    Raises:
        UserError: it is not such a number.
    """
    for unit, size in _FLOPS.items():
        number = text.lower().removesuffix(unit)
        if number != text.lower():
            try:
                if float(number) > 0:
                    return float(number) * size
            except ValueError:
                break
    raise UserError(f"--flops {text}: must be a rate above 0 such as 400tflops")


def given_step_seconds(texts: Sequence[str], sites: Sequence[str]) -> dict[str, Range]:
    """Step times by site that ``--step`` flags give: ``350ms`` for all, ``east=350ms`` for one.

    Raises:
        UserError: a flag cannot be read or names no site.
    """
    given = seconds_by_site("--step", texts, sites)
    return {site: Range.around(seconds, 0.97, 1.05) for site, seconds in given.items()}
