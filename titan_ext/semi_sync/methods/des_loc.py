"""Local Adam and DES-LOC (arXiv 2505.22549): parameters and Adam's moments, each with its own period.

The averages are taken after the inner step (the order of both public code bases). That equals the
paper's algorithm 1 with the gradient of a sync step evaluated at the averaged parameters.
Unconfirmed in the paper and chosen so: Adam's usual bias correction and epsilon, with a step count
that all sites share.
"""

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.plan import SyncPlan, SyncRow

FIRST_MOMENT = "exp_avg"
SECOND_MOMENT = "exp_avg_sq"


_AT_ONCE = {"fragment_sync_delay": 0}  # the inner loop goes on changing the moments


@register_method(
    "des_loc",
    fixed=_AT_ONCE,
    sync_every=16,
    outer_optimizer="average",
    first_moment_sync_every=None,
    second_moment_sync_every=None,
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
    """Parameters and both moments together every K steps."""
    return _plan(config, config.sync_every, config.sync_every)


def _plan(config, first_moment_period: int, second_moment_period: int) -> SyncPlan:
    rows = []
    for fragment in range(config.num_fragments):
        # The last fragment is due after every multiple of a period, the others so many steps earlier.
        offset = -(config.num_fragments - 1 - fragment) * (config.sync_every // config.num_fragments)
        rows += [
            SyncRow(
                fragment=fragment,
                period=config.sync_every,
                offset=offset,
                outer_optimizer=config.outer_optimizer != "average",
            ),
            SyncRow(state=FIRST_MOMENT, fragment=fragment, period=first_moment_period, offset=offset),
            SyncRow(state=SECOND_MOMENT, fragment=fragment, period=second_moment_period, offset=offset),
        ]
    return SyncPlan(tuple(rows))
