"""LoRDO (arXiv 2602.04396): low-rank moments travel, in a basis that comes from the averaged pseudo-gradient.

The inner optimizer is LowRankAdamW. With its ``basis_from = "outer"`` each sync averages parameters and moments
in the old basis, takes the top singular vectors of the averaged pseudo-gradient, and turns the moments into them
(the order of optimizers without a paper's listing: averages first, so that all moments share one basis). With
"gradient" every site finds its own bases: LoRDO-Local, the baseline. The first basis is unconfirmed; here it is
one random orthonormal basis for all sites until the first sync. Error feedback stays at its site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.optim.projection import projection, random_basis
from titan_ext.semi_sync.methods.des_loc import NESTEROV
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.plan import Apply, SyncRule
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer
from titan_ext.semi_sync.state.synced_parameters import Average, SyncedParameters
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors, NamedState
from titan_ext.semi_sync.state.views import like, local_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankAverage(Apply):
    """The mean of moments that have the shape of their basis."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """The moments."""
        return LowRankMoments(rule, tensors, options)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshBases(Apply):
    """The mean or an outer step moves the parameters; their change renews the bases of the inner optimizer."""

    optimizer: OuterOptimizer | None
    """None takes the mean itself."""

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedParameters:
        """Parameters with the bases of the inner optimizer."""
        return ParametersWithBases(rule, tensors, options)


class LowRankMoments(SyncedState):
    """Moments in the shape of their basis, not of their parameter."""

    facts = StateFacts(elementwise=False)


class ParametersWithBases(SyncedParameters):
    """Parameters whose averaged pseudo-gradient renews the bases of the inner optimizer."""

    facts = StateFacts(copies=1, elementwise=False, equal_at_all_sites=True)

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        view = tensors.view
        self._optimizer_of = {
            name: optimizer
            for optimizer in getattr(view, "optimizers", [])
            for name in self.names
            if any(view.parameters[name] is each for each in _low_rank(optimizer))
        }
        for name in self._renewed():
            parameter = view.parameters[name]
            self._optimizer_of[name].set_basis(parameter, random_basis(min(parameter.shape), self._rank(name)))

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """Move the parameters, then the bases. The moments' rules of the round come first."""
        before = {name: self._part(name).clone() for name in self._renewed()}
        super().apply(total, of)
        for name, old in before.items():
            parameter, optimizer = self.tensors.view.parameters[name], self._optimizer_of[name]
            change = like(parameter, old.sub_(self._part(name)).to(local_tensor(parameter).device))
            iterations = self._group(name)["power_iterations"]
            optimizer.set_basis(parameter, projection(change, self._rank(name), iterations))

    def shared_state(self) -> NamedState:
        """Global values and the bases."""
        shared = super().shared_state()
        for name, optimizer in self._optimizer_of.items():
            shared[name]["basis"] = local_tensor(optimizer.state[self.tensors.view.parameters[name]]["basis"])
        return shared

    def checkpoint_state(self) -> NamedState:
        """Without the bases, which the inner optimizer's own checkpoint holds."""
        return self.tensors.with_global_shapes(super().shared_state())

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what ``checkpoint_state`` returned."""
        self.load(super().shared_state(), state)

    def _renewed(self) -> list[str]:
        return [name for name in self._optimizer_of if self._group(name)["basis_from"] == "outer"]

    def _part(self, name: str) -> torch.Tensor:
        return self.global_parts[self.names.index(name)]

    def _rank(self, name: str) -> int:
        return self._group(name)["rank"]

    def _group(self, name: str) -> dict[str, Any]:
        parameter = self.tensors.view.parameters[name]
        groups = self._optimizer_of[name].param_groups
        return next(group for group in groups if any(each is parameter for each in group["params"]))


def _low_rank(optimizer: Any) -> list[torch.Tensor]:
    return list(optimizer.low_rank_parameters().values()) if hasattr(optimizer, "low_rank_parameters") else []


@register_method(
    "lordo",
    outer=NESTEROV,
    fixed={"fragment_sync_delay": 0, "error_feedback": False},
    sync_every=32,
    outer_optimizer="average",
    error_feedback=False,
)
def lordo(context: MethodContext) -> list[SyncRule]:
    """Parameters and all moments every K steps, the moments first."""
    moments, parameters = [], []
    for fragment in range(context.num_fragments):
        place: dict[str, Any] = {
            "fragment": fragment,
            "period": context.sync_every,
            "offset": context.staggered_offset(fragment),
            "wire": context.wire,
        }
        for state in ("low_exp_avg", "low_exp_avg_sq"):
            moments.append(SyncRule(state=state, required="some", apply=LowRankAverage(), **place))
        for state in ("exp_avg", "exp_avg_sq"):
            moments.append(SyncRule(state=state, required="none", apply=Average(), **place))
        parameters.append(SyncRule(apply=RefreshBases(optimizer=context.outer_optimizer), **place))
    return [*moments, *parameters]
