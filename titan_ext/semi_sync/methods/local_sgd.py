"""Local SGD (FedAvg): parameters averaged every K inner steps (arXiv 1805.09767)."""

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.plan.plan import SyncPlan, SyncRow


@register_method("local_sgd", sync_every=16, outer_optimizer="average")
def local_sgd(config) -> SyncPlan:
    """One row of parameters for each fragment, applied by the mean."""
    spacing = config.sync_every // config.num_fragments
    return SyncPlan(
        tuple(
            SyncRow(
                fragment=fragment,
                period=config.sync_every,
                offset=(fragment + 1) * spacing - config.fragment_sync_delay,
                delay=config.fragment_sync_delay,
                mixing=config.fragment_update_alpha,
                outer_optimizer=config.outer_optimizer != "average",
            )
            for fragment in range(config.num_fragments)
        )
    )
