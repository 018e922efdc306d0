"""Eager DiLoCo (arXiv 2502.12996): the exchange has the whole next inner phase to arrive.

A round's outer step takes the mean of the round before, in which this site's own share is replaced
by its fresh pseudo-gradient: ``mean' + (fresh - stale) w / sum(w)``. Sites therefore differ until the
end, where they average once. Unconfirmed in the paper and chosen so: where there is no earlier mean
(the first round, a round that failed, a site that just joined) the missing shares are taken to equal
the fresh one.
"""

from typing import Any

import torch

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.methods.final_mean import final_rows
from titan_ext.semi_sync.plan.plan import SyncPlan, SyncRow
from titan_ext.semi_sync.state.synced_parameters import GlobalRow
from titan_ext.semi_sync.state.synced_state import Landing


class EagerRow(GlobalRow):
    """Steps at the launch, with what has arrived by then; what lands is kept for the next launch.

    ``global_parts`` are this site's own outer parameters.
    """

    agrees = False  # sites differ until the end
    copies = 3  # own outer parameters, the last contribution, the mean that arrived

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sends_difference = True
        self._sent = self.empty().zero_()
        self._mean = self.empty().zero_()
        # A tensor, so that a checkpoint restores it in place: our share of the mean, 0 if there is none.
        self._share = torch.zeros(())

    @torch.no_grad()
    def write(self, out: torch.Tensor, clock: int) -> None:
        """The fresh pseudo-gradient; the outer step on it and the stale mean is taken at once."""
        super().write(out, clock)
        step = out.clone()
        if self._share > 0:
            # fresh + (mean - stale share) instead of fresh alone.
            step.sub_(self._sent).mul_(self._share.to(step)).add_(self._mean)
        self._sent.copy_(out)
        self._share.zero_()
        if self.elements:
            self.move_global(step)
            self.reset_local_to_global()

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """Keep the mean for the next launch."""
        if landing.weight > 0:
            self._mean.copy_(landing.mean(total))
            self._share.fill_(landing.weight / landing.total_weight)

    def private_state(self) -> dict[str, dict[str, Any]]:
        """The last contribution and the mean that waits for the next launch."""
        return {
            name: {"sent": sent, "mean": mean, "share": self._share}
            for name, sent, mean in zip(self.names, self.split(self._sent), self.split(self._mean))
        }


@register_method(
    "eager_diloco",
    fixed={"fragment_sync_delay": 0, "fragment_update_alpha": 0.0, "aggregation": "mean"},  # the delay is the whole phase
    sync_every=30,
    outer_optimizer="sgd",
    outer_lr=0.7,
    outer_momentum=0.9,
    nesterov=True,
)
def eager_diloco(config) -> SyncPlan:
    """One row for each fragment, which has until the next launch of any fragment to arrive."""
    spacing = config.sync_every // config.num_fragments
    return SyncPlan(
        tuple(
            SyncRow(
                kind=EagerRow,
                fragment=fragment,
                period=config.sync_every,
                offset=(fragment + 1) * spacing,
                delay=spacing,
                outer_optimizer=config.outer_optimizer != "average",
                retry=False,
            )
            for fragment in range(config.num_fragments)
        )
        + final_rows(config)
    )
