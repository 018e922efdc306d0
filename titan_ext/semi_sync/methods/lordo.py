"""LoRDO (arXiv 2602.04396): low-rank moments travel, in a basis that comes from the averaged pseudo-gradient.

The inner optimizer is LowRankAdamW. With its ``basis_from = "outer"`` each sync averages parameters and moments
in the old basis, takes the top singular vectors of the averaged pseudo-gradient, and turns the moments into them
(the order of optimizers without a paper's listing: averages first, so that all moments share one basis). With
"gradient" every site finds its own bases: LoRDO-Local, the baseline. The first basis is unconfirmed; here it is
one random orthonormal basis for all sites until the first sync. Error feedback stays at its site.
"""

from collections.abc import Mapping
from typing import Any

import torch

from titan_ext.optim.projection import projection, random_basis
from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.methods.des_loc import parameter_row, staggered
from titan_ext.semi_sync.plan.plan import SyncPlan, SyncRow
from titan_ext.semi_sync.state.synced_parameters import GlobalRow
from titan_ext.semi_sync.state.synced_state import Landing, SyncedRow
from titan_ext.semi_sync.state.views import like, local_tensor


class LowRankMoments(SyncedRow):
    """Moments in the shape of their basis, not of their parameter."""

    any_layout = False


class BasisRow(GlobalRow):
    """Parameters whose averaged pseudo-gradient renews the bases of the inner optimizer."""

    any_layout = False

    def __init__(self, row, names, view, config, device=None, **options: Any) -> None:
        super().__init__(row, names, view, config, device, **options)
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
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """Move the parameters, then the bases. The moments' rows of the round come first."""
        before = {name: self._part(name).clone() for name in self._renewed()}
        super().apply(total, landing)
        for name, old in before.items():
            parameter, optimizer = self.view.parameters[name], self._optimizer_of[name]
            change = like(parameter, old.sub_(self._part(name)).to(local_tensor(parameter).device))
            iterations = self._group(name)["power_iterations"]
            optimizer.set_basis(parameter, projection(change, self._rank(name), iterations))

    def shared_state(self) -> dict[str, dict[str, Any]]:
        """Global values and the bases."""
        shared = super().shared_state()
        for name, optimizer in self._optimizer_of.items():
            shared[name]["basis"] = local_tensor(optimizer.state[self.view.parameters[name]]["basis"])
        return shared

    def checkpoint_state(self) -> dict[str, Any]:
        """Without the bases, which the inner optimizer's own checkpoint holds."""
        return {
            name: {key: self.with_global_shape(name, value) for key, value in values.items()}
            for name, values in super().shared_state().items()
        }

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
        parameter = self.view.parameters[name]
        groups = self._optimizer_of[name].param_groups
        return next(group for group in groups if any(each is parameter for each in group["params"]))


def _low_rank(optimizer: Any) -> list[torch.Tensor]:
    return list(optimizer.low_rank_parameters().values()) if hasattr(optimizer, "low_rank_parameters") else []


@register_method(
    "lordo",
    fixed={"fragment_sync_delay": 0, "error_feedback": False},
    sync_every=32,
    outer_optimizer="average",
    error_feedback=False,
)
def lordo(config) -> SyncPlan:
    """Parameters and all moments every K steps, the moments first."""
    rows = []
    for fragment in range(config.num_fragments):
        place = {"fragment": fragment, "period": config.sync_every, "offset": staggered(config, fragment)}
        for state in ("low_exp_avg", "low_exp_avg_sq"):
            rows.append(SyncRow(kind=LowRankMoments, state=state, required="some", **place))
        for state in ("exp_avg", "exp_avg_sq"):
            rows.append(SyncRow(state=state, required="none", **place))
    for fragment in range(config.num_fragments):
        base = parameter_row(config, fragment, staggered(config, fragment))
        rows.append(
            SyncRow(
                kind=BasisRow,
                fragment=fragment,
                period=base.period,
                offset=base.offset,
                outer_optimizer=base.outer_optimizer,
            )
        )
    return SyncPlan(tuple(rows))
