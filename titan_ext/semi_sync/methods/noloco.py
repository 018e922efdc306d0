"""NoLoCo (arXiv 2506.10911): sites meet in pairs, and a modified momentum pulls their slow weights together.

With slow weights phi and fast ones theta, and means over the pair:
``delta = alpha delta + beta mean(theta - phi) - gamma (phi - mean(phi))``, ``phi = phi + delta``, ``theta = phi``
(equation 2 with the sign of the paper's own proof and code). alpha is ``outer_momentum``, beta ``outer_lr``, gamma
``[semi_sync.noloco] gossip_gamma``. A site without a partner steps alone. The paper leaves open what a joining site and the
finished model are; here a joining site takes a member's slow weights with delta = 0, and the sites average once at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.semi_sync.methods.final_average import final_rules
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.outer_optimizers import Sgd
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.wire.gossip import PairExchange


@dataclass(frozen=True, kw_only=True)
class NoLoCoSettings:
    """``[semi_sync.noloco]``.

    Raises:
        ValueError: gamma is negative.
    """

    gossip_gamma: float = 0.7
    """How strongly the slow weights of a pair pull at each other."""

    def __post_init__(self) -> None:
        if self.gossip_gamma < 0:
            raise ValueError(f"gossip_gamma = {self.gossip_gamma}: must be at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class GossipStep(Apply):
    """The modified momentum of equation 2 on a pair's means."""

    alpha: float
    beta: float
    gamma: float

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """Parameters with slow weights."""
        return GossipParameters(rule, tensors, options)


class GossipParameters(SyncedState):
    """Sends fast weights, slow weights and, as the last number, its weight: the pair's total follows."""

    facts = StateFacts(copies=2, values_per_element=2)  # phi and delta
    plain_numbers = 1

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        apply = rule.apply
        assert isinstance(apply, GossipStep)
        self._alpha, self._beta, self._gamma = apply.alpha, apply.beta, apply.gamma
        self._slow, self._delta = tensors.empty(), tensors.empty().zero_()
        tensors.read(self._slow)
        self.reduction = PairExchange(rule.wire.bucket_elements)

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """``[theta, phi, 1]``."""
        fast, slow, one = out.split([self.elements, self.elements, 1])
        super().write(fast, step)
        if self.tensors.narrow:
            # What was put into the parameters is not quite the slow weights; the work since then counts, not the rounding.
            slow_parts = self.tensors.split(self._slow)
            for part, value, local in zip(self.tensors.split(fast), slow_parts, self.tensors.locals(), strict=True):
                part.add_(value - value.to(local.dtype).to(part))
        slow.copy_(self._slow)
        one.fill_(1.0)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """The step on the pair's means."""
        weight = total[-1].item()
        if weight == 0 or not self.elements:
            return
        fast, slow = total[:-1].div_(weight).split(self.elements)
        self._delta.mul_(self._alpha).add_(fast, alpha=self._beta).sub_(slow, alpha=self._beta)
        self._delta.sub_(self._slow, alpha=self._gamma).add_(slow, alpha=self._gamma)
        self._slow.add_(self._delta)
        self.reset_local_to_global()

    def reset_local_to_global(self) -> None:
        """Back to the slow weights."""
        self.tensors.write(self.tensors.split(self._slow))

    def start_from_local(self) -> bool:
        """The parameters become the slow weights."""
        return self.tensors.refresh(self.tensors.split(self._slow))

    def shared_state(self) -> NamedState:
        """The slow weights."""
        return {name: {"slow": part} for name, part in zip(self.names, self.tensors.split(self._slow), strict=True)}

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A member's slow weights become ours, at rest."""
        self.load(self.shared_state(), state)
        self._delta.zero_()
        self.reset_local_to_global()

    def private_state(self) -> NamedState:
        """The momentum."""
        return {name: {"delta": part} for name, part in zip(self.names, self.tensors.split(self._delta), strict=True)}


@register_method(
    "noloco",
    settings=NoLoCoSettings,
    fixed={
        "fragment_sync_delay": 0,
        "fragment_update_alpha": 0.0,
        "outer_optimizer": "sgd",  # its learning rate and momentum are beta and alpha
        "nesterov": False,
        "codec": "fp32",
        "aggregation": "mean",
    },
    outer={"sgd": {"outer_lr": 0.7, "outer_momentum": 0.5, "nesterov": False}},
    sync_every=50,
    outer_optimizer="sgd",
)
def noloco(context: MethodContext) -> list[SyncRule]:
    """One rule for each fragment, in turn."""
    outer = context.outer_optimizer
    assert isinstance(outer, Sgd)
    step = GossipStep(alpha=outer.momentum, beta=outer.lr, gamma=context.settings.gossip_gamma)
    rules = [
        SyncRule(
            fragment=fragment,
            period=context.sync_every,
            offset=(fragment + 1) * context.spacing,
            wire=context.wire,
            apply=step,
        )
        for fragment in range(context.num_fragments)
    ]
    return [*rules, *final_rules(context)]
