"""Losses over steps."""

from collections.abc import Iterable


def steps_to(curve: Iterable[tuple[int, float]], target: float) -> float | None:
    """Step at which a curve first is down at ``target``, between measurements in a straight line; None: never."""
    before = None
    for step, loss in curve:
        if loss <= target:
            return step if before is None else step - (step - before[0]) * (target - loss) / (before[1] - loss)
        before = step, loss
    return None
