"""Local Adam and DES-LOC (arXiv 2505.22549): parameters and an optimizer's moments, each with its own period.

They work around AdamW, ADOPT, SGD with momentum and Muon alike: the first moment is whichever of these
an optimizer keeps, the second may be missing. By default the averages are taken after the inner step (the
order of both public code bases), which equals the paper's algorithm 1 with the gradient of a sync step
evaluated at the averaged parameters; ``sync_point = "before_step"`` takes them between the gradient and the step.
Unconfirmed in the paper and chosen so: Adam's usual bias correction and epsilon, with a step count that
all sites share.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from titan_ext.optim.moments import Moment
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import SyncRule
from titan_ext.semi_sync.state.synced_parameters import Average, average_or_step

FIRST_MOMENT = "exp_avg|momentum_buffer"
SECOND_MOMENT = "exp_avg_sq"

_AT_ONCE = {"fragment_sync_delay": 0}  # the inner loop goes on changing the moments
NESTEROV = {"sgd": {"outer_lr": 1.0, "outer_momentum": 0.9, "nesterov": True}}
"""DES-LOC Nesterov (section 5.5)."""


@dataclass(frozen=True, kw_only=True)
class DesLocSettings:
    """``[semi_sync.des_loc]``.

    Raises:
        ValueError: a period is below 1, or periods are given twice.
    """

    first_moment_sync_every: int | None = None
    """K_u: inner steps between two averages of the first moment; by default 3 times sync_every."""

    second_moment_sync_every: int | None = None
    """K_v: inner steps between two averages of the second moment; by default 6 times sync_every."""

    half_life_periods: bool = False
    """Average each moment about once in its half-life (from the inner optimizer's decay rates) instead (appendix I)."""

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in ("first_moment_sync_every", "second_moment_sync_every")}
        for key, period in given.items():
            if period is not None and period < 1:
                raise ValueError(f"{key} = {period}: must be at least 1")
        if self.half_life_periods and any(given.values()):
            both = " or ".join(given)
            raise ValueError(f"half_life_periods = {self.half_life_periods}: must be false where {both} is given")


@register_method(
    "des_loc", settings=DesLocSettings, fixed=_AT_ONCE, outer=NESTEROV, sync_every=16, outer_optimizer="average"
)
def des_loc(context: MethodContext) -> list[SyncRule]:
    """Parameters every K_x, first moment every K_u, second every K_v; by default 3 and 6 times K_x.

    With ``outer_optimizer = "sgd"`` it is the paper's DES-LOC Nesterov: learning rate 1 and momentum 0.9 by default.
    """
    own: DesLocSettings = context.settings
    first = own.first_moment_sync_every or 3 * context.sync_every
    second = own.second_moment_sync_every or 6 * context.sync_every
    if own.half_life_periods and context.moments is not None:
        kept = list(context.moments())
        first = half_life_period(kept, 1, context.sync_every) or first
        second = half_life_period(kept, 2, context.sync_every) or second
    return _rules(context, first, second)


def half_life_period(kept: Iterable[tuple[int, Mapping[str, Moment]]], order: int, sync_every: int) -> int | None:
    """Inner steps between two averages of the moments of an order, about ``ln 2 / (1 - decay)``; None without any.

    It is a multiple of ``sync_every``, never more often than the parameters (arXiv 2505.22549, appendix I). Where decay
    rates differ (Muon's matrices and the AdamW of the rest), that of most elements counts.
    """
    elements: Counter[float] = Counter()
    for numel, moments in kept:
        for moment in moments.values():
            if moment.order == order:
                elements[moment.decay] += numel
    if not elements:
        return None
    decay = max(elements, key=lambda each: (elements[each], each))
    return sync_every * max(1, round(math.log(2) / (1 - decay) / sync_every))


@register_method("local_adam", fixed=_AT_ONCE, outer=NESTEROV, sync_every=16, outer_optimizer="average")
def local_adam(context: MethodContext) -> list[SyncRule]:
    """Parameters and all moments together every K steps: Local Adam, Local ADOPT, Local SGDM."""
    return _rules(context, context.sync_every, context.sync_every)


def _rules(context: MethodContext, first_moment_period: int, second_moment_period: int) -> list[SyncRule]:
    rules = []
    for fragment in range(context.num_fragments):
        place: dict[str, Any] = {
            "fragment": fragment,
            "offset": context.staggered_offset(fragment),
            "wire": context.wire,
        }
        rules += [
            parameter_rule(context, fragment),
            SyncRule(
                name="first_moment",
                state=FIRST_MOMENT,
                required="some",
                period=first_moment_period,
                apply=Average(),
                **place,
            ),
            SyncRule(
                name="second_moment",
                state=SECOND_MOMENT,
                required="none",
                period=second_moment_period,
                apply=Average(),
                **place,
            ),
        ]
    return rules


def parameter_rule(context: MethodContext, fragment: int) -> SyncRule:
    """The parameters of a fragment, averaged or taken by the outer optimizer every K_x steps."""
    return SyncRule(
        fragment=fragment,
        period=context.sync_every,
        offset=context.staggered_offset(fragment),
        wire=context.wire,
        apply=average_or_step(context.outer_optimizer),
    )
