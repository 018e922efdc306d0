"""Eager DiLoCo (arXiv 2502.12996): the exchange has the whole next inner phase to arrive.

A round's outer step takes the mean of the round before, in which this site's own share is replaced
by its fresh pseudo-gradient: ``mean' + (fresh - stale) w / sum(w)``. Sites therefore differ until the
end, where they average once. Unconfirmed in the paper and chosen so: where there is no earlier mean
(the first round, a round that failed, a site that just joined) the missing shares are taken to equal
the fresh one.
"""

from dataclasses import dataclass

import torch

from titan_ext.semi_sync.methods.final_average import final_rules
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer
from titan_ext.semi_sync.state.synced_parameters import SyncedParameters
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerStep(Apply):
    """The outer step on the site's fresh pseudo-gradient and the others' of the round before."""

    optimizer: OuterOptimizer | None
    """None takes the mean itself."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedParameters:
        """Parameters with what was sent and what has arrived."""
        return EagerParameters(rule, tensors, options)


class EagerParameters(SyncedParameters):
    """Steps at the launch, with what has arrived by then; what comes back is kept for the next launch.

    ``global_parts`` are this site's own outer parameters.
    """

    # Sites differ until the end. Own outer parameters, the last contribution, the mean that arrived.
    facts = StateFacts(copies=3, equal_at_all_sites=False)
    value_key = "own"

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        self.sends_difference = True
        self._sent = self.tensors.empty().zero_()
        self._mean = self.tensors.empty().zero_()
        # A tensor, so that a checkpoint restores it in place: our share of the mean, 0 if there is none.
        self._share = torch.zeros(())

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The fresh pseudo-gradient; in the place of the mean that has arrived, what the outer step is to take."""
        super().write(out, step)
        if self._share > 0:
            # fresh + (mean - stale share) instead of fresh alone.
            share = self._share.to(out)
            self._mean.addcmul_(out, share).addcmul_(self._sent, share, value=-1)
        else:
            self._mean.copy_(out)
        self._sent.copy_(out)
        self._share.zero_()

    @torch.no_grad()
    def launched(self, finite: bool) -> None:
        """The outer step, at once; none where a NaN would stay in this site's outer parameters for good."""
        if finite and self.elements:
            self.move_global(self._mean)
            self.reset_local_to_global()
        self._mean.zero_()
        if not finite:
            self._sent.zero_()

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Keep the mean for the next launch."""
        if of.weight > 0:
            self._mean.copy_(of.mean(total))
            self._share.fill_(of.weight / of.total_weight)

    def private_state(self) -> NamedState:
        """The last contribution and the mean that waits for the next launch."""
        return {
            name: {"sent": sent, "mean": mean, "share": self._share}
            for name, sent, mean in zip(
                self.names, self.tensors.split(self._sent), self.tensors.split(self._mean), strict=True
            )
        }


@register_method(
    "eager_diloco",
    fixed={
        "fragment_sync_delay": 0,
        "fragment_update_alpha": 0.0,
        "aggregation": "mean",
    },  # the delay is the whole phase
    outer={"sgd": {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True}},
    sync_every=30,
    outer_optimizer="sgd",
)
def eager_diloco(context: MethodContext) -> list[SyncRule]:
    """One rule for each fragment, which has until the next launch of any fragment to arrive."""
    rules = [
        SyncRule(
            fragment=fragment,
            period=context.sync_every,
            offset=(fragment + 1) * context.spacing,
            delay=context.spacing,
            retry=False,
            wire=context.wire,
            apply=EagerStep(optimizer=context.outer_optimizer),
        )
        for fragment in range(context.num_fragments)
    ]
    return [*rules, *final_rules(context)]
