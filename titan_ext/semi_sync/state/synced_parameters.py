"""Parameters with a global copy: the mean or an outer optimizer's step moves it, the local ones follow."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from titan_ext.semi_sync.plan.plan import SyncRow
from titan_ext.semi_sync.state.outer_optimizers import build_outer_optimizer, work_on
from titan_ext.semi_sync.state.synced_state import Landing, SyncedRow, refresh
from titan_ext.semi_sync.state.views import ModelView

if TYPE_CHECKING:
    from titan_ext.semi_sync.config import SemiSyncConfig

_PIECE = 2**22  # elements whose difference is formed at a time


class GlobalRow(SyncedRow):
    """Keeps the last committed global value in fp32.

    Args:
        row: the plan's row.
        names: the parameters of the row's fragment that this rank holds, in an order equal at all sites.
        view: this rank's tensors.
        config: resolved settings.
        device: where the global copy lives; None is where the parameters are.
        own_outer: an optimizer over the model's parameters to use instead of the configured one, see ``work_on``.
    """

    copies = 1
    guarded = True
    agrees = True

    def __init__(
        self,
        row: SyncRow,
        names: Sequence[str],
        view: ModelView,
        config: "SemiSyncConfig",
        device: torch.device | None = None,
        own_outer: Optimizer | None = None,
    ) -> None:
        super().__init__(row, names, view, config, device)
        # The mean of values is exact for one site and cheaper. A late landing must not undo the
        # steps taken meanwhile, and a codec's error must be one of the difference, not of the value.
        self.sends_difference = row.outer_optimizer or row.delay > 0 or config.codec != "fp32"
        self.global_flat = self.empty()
        self.global_parts = self.split(self.global_flat)
        if self.elements:
            torch._foreach_copy_(self.global_parts, self.locals())
        self.outer: Optimizer | None = None
        if own_outer is not None and self.elements:
            self.outer = own_outer
            work_on(own_outer, [view.parameters[name] for name in self.names], self.global_parts)
        elif row.outer_optimizer and self.elements:
            self.outer = build_outer_optimizer(config.outer_optimizer, self.global_parts, config.outer_settings())

    @torch.no_grad()
    def write(self, out: torch.Tensor, clock: int) -> None:
        """The values, or the pseudo-gradient: global minus local."""
        super().write(out, clock)
        if self.sends_difference:
            torch.sub(self.global_flat, out, out=out)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """Move the global copy, then the local parameters."""
        if not self.elements:
            return
        self.move_global(landing.mean(total))
        self._mix_into_local()

    @torch.no_grad()
    def move_global(self, mean: torch.Tensor) -> None:
        """The outer step on a mean contribution (fp32 ``[elements]``, overwritten)."""
        if self.outer is None:
            self.global_flat.sub_(mean) if self.sends_difference else self.global_flat.copy_(mean)
            return
        for part, gradient in zip(self.global_parts, self.split(mean), strict=True):
            part.grad = gradient
        self.outer.step()
        for part in self.global_parts:
            part.grad = None

    @torch.no_grad()
    def update_norm(self, contribution: torch.Tensor) -> float:
        """Of the pseudo-gradient, also where the values themselves are sent."""
        total = 0.0
        for part, base in zip(contribution.split(_PIECE), self.global_flat.split(_PIECE)):
            update = part if self.sends_difference else part - base
            total += torch.linalg.vector_norm(update).item() ** 2
        return total**0.5

    @torch.no_grad()
    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        """The pseudo-gradient shrinks; of values the distance to the global ones."""
        contribution.mul_(factor)
        if not self.sends_difference:
            contribution.add_(self.global_flat, alpha=weight * (1 - factor))

    def global_values(self) -> list[torch.Tensor]:
        """The global copy."""
        return self.global_parts

    @torch.no_grad()
    def reset_local_to_global(self) -> None:
        """Drop local work."""
        if self.elements:
            torch._foreach_copy_(self.locals(), self.global_parts)

    def start_from_local(self) -> bool:
        """The parameters become the global copy."""
        return refresh(self.global_parts, self.locals())

    def shared_state(self) -> dict[str, dict[str, Any]]:
        """Global values and the outer optimizer's state."""
        return {
            name: {"global": part, **self._outer_state(part)}
            for name, part in zip(self.names, self.global_parts, strict=True)
        }

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take another site's global copy, and its values as our own parameters.

        Local work since the last commit is dropped: the members may have averaged it already, and
        counting it twice would be worse than losing it.
        """
        self.load(self.shared_state(), state)
        self.reset_local_to_global()

    def load(self, own: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Tensors in place, and the outer optimizer's plain numbers."""
        super().load(own, state)
        for name, part in zip(self.names, self.global_parts):
            for key, value in own.get(name, {}).items():
                if key.startswith("outer.") and not isinstance(value, torch.Tensor):
                    self.outer.state[part][key.removeprefix("outer.")] = state[name][key]

    def _mix_into_local(self) -> None:
        if self.row.mixing == 0.0:
            self.reset_local_to_global()
            return
        for local, part in zip(self.locals(), self.global_parts, strict=True):
            local.copy_(torch.lerp(part, local.to(part), self.row.mixing))

    def _outer_state(self, part: torch.Tensor) -> dict[str, Any]:
        return {} if self.outer is None else {f"outer.{key}": value for key, value in self.outer.state[part].items()}
