"""Local SGD (FedAvg): parameters averaged every K inner steps (arXiv 1805.09767)."""

from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import SyncRule
from titan_ext.semi_sync.state.synced_parameters import average_or_step


@register_method("local_sgd", sync_every=16, outer_optimizer="average")
def local_sgd(context: MethodContext) -> list[SyncRule]:
    """One rule of parameters for each fragment."""
    return [
        SyncRule(
            fragment=fragment,
            period=context.sync_every,
            offset=(fragment + 1) * context.spacing - context.delay,
            delay=context.delay,
            wire=context.wire,
            apply=average_or_step(context.outer_optimizer, context.mixing),
        )
        for fragment in range(context.num_fragments)
    ]
