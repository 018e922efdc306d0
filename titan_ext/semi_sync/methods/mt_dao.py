"""MT-DAO (arXiv 2510.05361): DES-LOC's schedule around quasi-hyperbolic optimizers with one or many momenta.

The inner optimizer is QHAdamW, QHADOPT or QHSGDM; its slow momenta carry the direction that all sites share
over a whole round. Where the averages stand in the printed algorithm was not seen; they are taken after
the inner step, as in DES-LOC.
"""

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.methods.des_loc import parameter_row, staggered
from titan_ext.semi_sync.plan.plan import SyncPlan, SyncRow


@register_method(
    "mt_dao",
    fixed={"fragment_sync_delay": 0},  # the inner loop goes on changing the moments
    sync_every=32,
    outer_optimizer="average",
    momentum_sync_every=None,
    second_moment_sync_every=None,
)
def mt_dao(config) -> SyncPlan:
    """Parameters every K_x, the j-th momentum every K_j, the second moment every K_v; all K_x by default."""
    rows = []
    for fragment in range(config.num_fragments):
        offset = staggered(config, fragment)
        rows.append(parameter_row(config, fragment, offset))
        for place, period in enumerate(config.momentum_sync_every or [config.sync_every]):
            rows.append(SyncRow(state=f"exp_avg_{place}", fragment=fragment, period=period, offset=offset))
        rows.append(
            SyncRow(
                state="exp_avg_sq",
                required="none",
                fragment=fragment,
                period=config.second_moment_sync_every or config.sync_every,
                offset=offset,
            )
        )
    return SyncPlan(tuple(rows))
