"""Local Adam and DES-LOC (arXiv 2505.22549): parameters and an optimizer's moments, each with its own period.

They work around AdamW, ADOPT, SGD with momentum and Muon alike: the first moment is whichever of these
an optimizer keeps, the second may be missing. By default the averages are taken after the inner step (the
order of both public code bases), which equals the paper's algorithm 1 with the gradient of a sync step
evaluated at the averaged parameters; ``order = "paper"`` takes them between the gradient and the step.
Unconfirmed in the paper and chosen so: Adam's usual bias correction and epsilon, with a step count that
all sites share.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.plan.plan import SyncPlan, SyncRow

FIRST_MOMENT = "exp_avg|momentum_buffer"
SECOND_MOMENT = "exp_avg_sq"

_AT_ONCE = {"fragment_sync_delay": 0}  # the inner loop goes on changing the moments


def half_life(decay: float) -> float:
    """Steps after which half of a moment is gone: ``ln 0.5 / ln decay``."""
    return math.log(0.5) / math.log(decay) if decay > 0 else 0.0


def with_half_lives(config, betas: Sequence[float]):
    """The configuration with the moments' periods from their half-lives (the paper's appendix I).

    A moment is averaged about every ``ln 2 / (1 - beta)`` steps, at the nearest multiple of ``sync_every``,
    never more often than the parameters.

    Args:
        config: resolved settings of DES-LOC.
        betas: decay rates of the inner optimizer's first and second moment.
    """
    first, second = (
        config.sync_every * max(1, round(math.log(2) / (1 - beta) / config.sync_every)) for beta in betas[:2]
    )
    return replace(config, first_moment_sync_every=first, second_moment_sync_every=second, half_life_periods=False)


@register_method(
    "des_loc",
    fixed=_AT_ONCE,
    sync_every=16,
    outer_optimizer="average",
    first_moment_sync_every=None,
    second_moment_sync_every=None,
    half_life_periods=False,
)
def des_loc(config) -> SyncPlan:
    """Parameters every K_x, first moment every K_u, second every K_v; by default 3 and 6 times K_x.

    With ``outer_optimizer = "sgd"`` it is the paper's DES-LOC Nesterov (section 5.5).
    """
    return _plan(
        config,
        config.first_moment_sync_every or 3 * config.sync_every,
        config.second_moment_sync_every or 6 * config.sync_every,
    )


@register_method("local_adam", fixed=_AT_ONCE, sync_every=16, outer_optimizer="average")
def local_adam(config) -> SyncPlan:
    """Parameters and all moments together every K steps: Local Adam, Local ADOPT, Local SGDM."""
    return _plan(config, config.sync_every, config.sync_every)


def _plan(config, first_moment_period: int, second_moment_period: int) -> SyncPlan:
    rows = []
    for fragment in range(config.num_fragments):
        offset = staggered(config, fragment)
        rows += [
            parameter_row(config, fragment, offset),
            SyncRow(
                name="first_moment",
                state=FIRST_MOMENT,
                required="some",
                fragment=fragment,
                period=first_moment_period,
                offset=offset,
            ),
            SyncRow(
                name="second_moment",
                state=SECOND_MOMENT,
                required="none",
                fragment=fragment,
                period=second_moment_period,
                offset=offset,
            ),
        ]
    return SyncPlan(tuple(rows))


def staggered(config, fragment: int) -> int:
    """Offset of a fragment: the last is due after every multiple of a period, the others so many steps earlier."""
    return -(config.num_fragments - 1 - fragment) * (config.sync_every // config.num_fragments)


def parameter_row(config, fragment: int, offset: int) -> SyncRow:
    """The parameters of a fragment, averaged or taken by the outer optimizer every K_x steps."""
    outer = config.outer_optimizer != "average"
    return SyncRow(fragment=fragment, period=config.sync_every, offset=offset, outer_optimizer=outer)
