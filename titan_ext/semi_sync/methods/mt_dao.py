"""MT-DAO (arXiv 2510.05361): DES-LOC's schedule around quasi-hyperbolic optimizers with one or many momenta.

The inner optimizer is QHAdamW, QHADOPT or QHSGDM; its slow momenta carry the direction that all sites share
over a whole round. Where the averages stand in the printed algorithm was not seen; they are taken after
the inner step, as in DES-LOC.
"""

from dataclasses import dataclass
from typing import Any

from titan_ext.semi_sync.methods.des_loc import NESTEROV, parameter_rule
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import SyncRule
from titan_ext.semi_sync.state.synced_parameters import Average


@dataclass(frozen=True, kw_only=True)
class MtDaoSettings:
    """``[semi_sync.mt_dao]``.

    Raises:
        ValueError: a period is below 1.
    """

    momentum_sync_every: tuple[int, ...] | None = None
    """Inner steps between two averages of each momentum, in the order of the optimizer's betas; by default all of them
    are averaged with the parameters."""

    second_moment_sync_every: int | None = None
    """K_v: inner steps between two averages of the second moment; by default sync_every."""

    def __post_init__(self) -> None:
        momenta, second = self.momentum_sync_every, self.second_moment_sync_every
        if momenta is not None and not (momenta and all(each >= 1 for each in momenta)):
            raise ValueError(f"momentum_sync_every = {momenta}: must be a list of periods, each at least 1")
        if second is not None and second < 1:
            raise ValueError(f"second_moment_sync_every = {second}: must be at least 1")


@register_method(
    "mt_dao",
    settings=MtDaoSettings,
    outer=NESTEROV,
    fixed={"fragment_sync_delay": 0},  # the inner loop goes on changing the moments
    sync_every=32,
    outer_optimizer="average",
)
def mt_dao(context: MethodContext) -> list[SyncRule]:
    """Parameters every K_x, the j-th momentum every K_j, the second moment every K_v; all K_x by default."""
    own: MtDaoSettings = context.settings
    rules = []
    for fragment in range(context.num_fragments):
        place: dict[str, Any] = {
            "fragment": fragment,
            "offset": context.staggered_offset(fragment),
            "wire": context.wire,
        }
        rules.append(parameter_rule(context, fragment))
        for index, period in enumerate(own.momentum_sync_every or [context.sync_every] * _momenta(context)):
            rules.append(SyncRule(state=f"exp_avg_{index}", period=period, apply=Average(), **place))
        rules.append(
            SyncRule(
                state="exp_avg_sq",
                required="none",
                period=own.second_moment_sync_every or context.sync_every,
                apply=Average(),
                **place,
            )
        )
    return rules


def _momenta(context: MethodContext) -> int:
    """How many momenta the inner optimizer keeps of a parameter; 1 where it is not known."""
    kept = context.moments() if context.moments is not None else ()
    return max((sum(moment.order == 1 for moment in moments.values()) for _, moments in kept), default=1)
