"""NoLoCo (arXiv 2506.10911): sites meet in pairs, and a modified momentum pulls their slow weights together.

With slow weights phi and fast ones theta, and means over the pair:
``delta = alpha delta + beta mean(theta - phi) - gamma (phi - mean(phi))``, ``phi = phi + delta``, ``theta = phi``
(equation 2 with the sign of the paper's own proof and code). alpha is ``outer_momentum``, beta ``outer_lr``, gamma
``gossip_gamma``. A site without a partner steps alone. The paper leaves open what a joining site and the finished
model are; here a joining site takes a member's slow weights with delta = 0, and the sites average once at the end.
"""

from collections.abc import Mapping
from typing import Any

import torch

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.methods.final_mean import final_rows
from titan_ext.semi_sync.plan.plan import SyncPlan, SyncRow
from titan_ext.semi_sync.state.synced_state import Landing, SyncedRow, refresh
from titan_ext.semi_sync.wire.gossip import PairExchange


class GossipRow(SyncedRow):
    """Sends fast weights, slow weights and, as the last number, its weight: the pair's total follows."""

    copies = 2  # phi and delta
    values_per_element = 2
    plain_numbers = 1

    def __init__(self, row, names, view, config, device=None) -> None:
        super().__init__(row, names, view, config, device)
        self._alpha, self._beta, self._gamma = config.outer_momentum, config.outer_lr, config.gossip_gamma
        self._slow, self._delta = self.empty(), self.empty().zero_()
        if self.elements:
            torch._foreach_copy_(self.split(self._slow), self.locals())
        self.reduction = PairExchange(int(config.bucket_mib * 2**18))

    @torch.no_grad()
    def write(self, out: torch.Tensor, clock: int) -> None:
        """``[theta, phi, 1]``."""
        fast, slow, one = out.split([self.elements, self.elements, 1])
        super().write(fast, clock)
        slow.copy_(self._slow)
        one.fill_(1.0)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """The step on the pair's means."""
        weight = total[-1].item()
        if weight == 0 or not self.elements:
            return
        fast, slow = total[:-1].div_(weight).split(self.elements)
        self._delta.mul_(self._alpha).add_(fast, alpha=self._beta).sub_(slow, alpha=self._beta)
        self._delta.sub_(self._slow, alpha=self._gamma).add_(slow, alpha=self._gamma)
        self._slow.add_(self._delta)
        self.reset_local_to_global()

    @torch.no_grad()
    def reset_local_to_global(self) -> None:
        """Back to the slow weights."""
        if self.elements:
            torch._foreach_copy_(self.locals(), self.split(self._slow))

    def start_from_local(self) -> bool:
        """The parameters become the slow weights."""
        return refresh(self.split(self._slow), self.locals())

    def shared_state(self) -> dict[str, dict[str, Any]]:
        """The slow weights."""
        return {name: {"slow": part} for name, part in zip(self.names, self.split(self._slow))}

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A member's slow weights become ours, at rest."""
        self.load(self.shared_state(), state)
        self._delta.zero_()
        self.reset_local_to_global()

    def private_state(self) -> dict[str, dict[str, Any]]:
        """The momentum."""
        return {name: {"delta": part} for name, part in zip(self.names, self.split(self._delta))}


@register_method(
    "noloco",
    fixed={
        "fragment_sync_delay": 0,
        "fragment_update_alpha": 0.0,
        "outer_optimizer": "average",
        "codec": "fp32",
        "aggregation": "mean",
    },
    sync_every=50,
    outer_optimizer="average",
    outer_lr=0.7,
    outer_momentum=0.5,
    gossip_gamma=0.7,
)
def noloco(config) -> SyncPlan:
    """One row for each fragment, in turn."""
    spacing = config.sync_every // config.num_fragments
    return SyncPlan(
        tuple(
            SyncRow(kind=GossipRow, fragment=fragment, period=config.sync_every, offset=(fragment + 1) * spacing)
            for fragment in range(config.num_fragments)
        )
        + final_rows(config)
    )
