"""A row of the plan bound to this rank's tensors: what it sends and how it takes what comes back.

``SyncedRow`` is the interface of all kinds. Its plain form is the mean of an optimizer's state;
``global_row.GlobalRow`` keeps a global copy of parameters, and methods bring kinds of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from titan_ext.semi_sync.plan.plan import SyncRow
from titan_ext.semi_sync.state.views import ModelView, like, local_tensor
from titan_ext.semi_sync.wire.reductions import Reduction

if TYPE_CHECKING:
    from titan_ext.semi_sync.config import SemiSyncConfig


@dataclass(frozen=True, slots=True)
class Landing:
    """What a row learns of the round that brings it a sum."""

    clock: int
    """Inner step of the launch, equal at all sites."""
    weight: float
    """This site's own weight in the sum; 0 if it only joins."""
    total_weight: float
    """Sum of the weights of all that contributed."""

    def mean(self, total: torch.Tensor) -> torch.Tensor:
        """``total`` divided by the sum of the weights, in place."""
        return total.div_(self.total_weight) if self.total_weight != 1.0 else total


class SyncedRow:
    """The local part of one synced state of one fragment, possibly empty on this rank.

    Its mean over the sites replaces the local value.

    Args:
        row: the plan's row.
        names: the parameters of the row's fragment that this rank holds, in an order equal at all sites.
        view: this rank's tensors.
        config: resolved settings.
        device: where the row's own memory lies; None is where the parameters are.
    """

    copies = 0
    """Values of the size of the row's parameters that the kind keeps, outer optimizer aside."""

    values_per_element = 1
    """A message is so many values of each parameter's shape, one parameter after the other, each time …"""

    plain_numbers = 0
    """… followed by so many numbers that are equal on all ranks of a site."""

    any_layout = True
    """Whether sites that cut their tensors differently can exchange it: whether it is elementwise."""

    guarded = False
    """Whether its size is that of an update, so that one far larger than the others' is an outlier."""

    agrees = False
    """Whether its shared state is equal at all sites after each commit."""

    by_row = False
    """Whether only the sites that hold a row of a table share it."""

    adopts = False
    """Whether a newcomer takes its values in a round, from any site, instead of all of them from one member."""

    adoption: Reduction
    """How newcomers get them; if ``adopts``."""

    takes_lost = False
    """Whether ``take_lost`` is to be called with what the reduction took away."""

    def __init__(
        self,
        row: SyncRow,
        names: Sequence[str],
        view: ModelView,
        config: "SemiSyncConfig",
        device: torch.device | None = None,
    ) -> None:
        self.row = row
        self.names = list(names)
        self.view = view
        locals_ = self.locals()
        self._shapes = [tensor.shape for tensor in locals_]
        self.elements = sum(tensor.numel() for tensor in locals_)
        self.device = device or (locals_[0].device if locals_ else torch.device("cpu"))
        self.pinned = self.device.type == "cpu" and any(tensor.is_cuda for tensor in locals_)
        self.reduction: Reduction | None = None
        """How the row is summed where that is not the configured way."""
        self._error_feedback = bool(config.error_feedback)

    @property
    def feeds_back(self) -> bool:
        """Whether what the codec takes away goes into the next contribution."""
        return self._error_feedback and self.reduction is None

    @property
    def numel(self) -> int:
        """fp32 elements of its message."""
        return self.values_per_element * self.elements + self.plain_numbers

    def empty(self) -> torch.Tensor:
        """Room for a value of each of the row's parameters: fp32 ``[elements]``."""
        return torch.empty(self.elements, dtype=torch.float32, device=self.device, pin_memory=self.pinned)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``[elements]`` tensor in the shapes of the row's local tensors."""
        parts, start = [], 0
        for shape in self._shapes:
            parts.append(flat[start : start + shape.numel()].view(shape))
            start += shape.numel()
        return parts

    def locals(self) -> list[torch.Tensor]:
        """The local tensors that the row covers."""
        return self.view.tensors(self.row.state, self.names)

    @torch.no_grad()
    def write(self, out: torch.Tensor, clock: int) -> None:
        """Fill ``out`` (fp32 ``[numel]``) with this site's contribution to the round of inner step ``clock``."""
        if self.elements:
            torch._foreach_copy_(self.split(out), self.locals())

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """Take the weighted sum over the sites (fp32 ``[numel]``, overwritten)."""
        if self.elements:
            torch._foreach_copy_(self.locals(), self.split(landing.mean(total)))

    def update_norm(self, contribution: torch.Tensor) -> float:
        """Euclidean norm of the update that ``write`` just wrote (fp32 ``[numel]``), on this rank; if ``guarded``."""
        raise NotImplementedError

    def damp(self, contribution: torch.Tensor, factor: float, weight: float) -> None:
        """Shrink the update in a contribution (fp32 ``[numel]``, multiplied by ``weight``) to ``factor``; if ``guarded``."""
        raise NotImplementedError

    def take_lost(self, lost: torch.Tensor) -> None:
        """Take back what the other sites could not read of a committed contribution (fp32 ``[numel]``)."""

    def global_values(self) -> list[torch.Tensor]:
        """The last committed global value of each parameter, where the kind knows it."""
        return []

    def reset_local_to_global(self) -> None:
        """Drop local work, where there is something global to go back to."""

    def start_from_local(self) -> bool:
        """Take the parameters as they are now for what the run starts from, where the kind keeps a copy of them.

        Returns:
            Whether they differ, on this rank, from what they were when the row was bound: a model was loaded.
        """
        return False

    def shared_state(self) -> dict[str, dict[str, Any]]:
        """What a joining site takes over, by parameter name: local tensors, not copies."""
        return {}

    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over another site's shared state of the same shards.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """

    def private_state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds beside the shared state, by parameter name; it is this site's alone."""
        return {}

    def checkpoint_state(self) -> dict[str, Any]:
        """Shared and private state with global shapes (DTensors where the parameters are), for DCP."""
        shared, private = self.shared_state(), self.private_state()
        return {
            name: {
                key: self.with_global_shape(name, value)
                for key, value in (shared.get(name, {}) | private.get(name, {})).items()
            }
            for name in self.names
            if name in shared or name in private
        }

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what ``checkpoint_state`` returned; the local parameters are restored elsewhere.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        self.load(self.shared_state(), state)
        self.load(self.private_state(), state)

    @torch.no_grad()
    def load(self, own: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy into our own tensors those of the same names.

        Raises:
            ValueError: one is missing or has another shape.
        """
        for name, values in own.items():
            for key, value in values.items():
                if key not in state.get(name, {}):
                    raise ValueError(f"the saved or received state lacks {name} ({key})")
                if isinstance(value, torch.Tensor):
                    _copy_checked(f"{name} ({key})", value, local_tensor(state[name][key]))

    def agreed_shape(self, shape: Sequence[int]) -> tuple[object, ...]:
        """What sites must have in common of a tensor of this shape."""
        return tuple(shape)

    def offered(self) -> list[torch.Tensor]:
        """Messages (fp32 ``[numel]``) with all that a newcomer adopts; if ``adopts``."""
        raise NotImplementedError

    def adopt(self, messages: Sequence[torch.Tensor]) -> None:
        """Take over what ``offered`` came to among all sites; if ``adopts``."""
        raise NotImplementedError

    def described(self) -> list[tuple[str, torch.Tensor]]:
        """Name and local tensor of everything the row covers on this rank."""
        return list(zip(self.names, self.locals(), strict=True))

    def named_parts(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A message as parameters' shards by name, with global shapes.

        Raises:
            ValueError: the row's message is made of other things.
        """
        if self.numel != self.elements:
            raise ValueError(f"row {self.row.key}: its message cannot be kept by parameter")
        return {name: self.with_global_shape(name, part) for name, part in zip(self.names, self.split(flat))}

    @torch.no_grad()
    def fill_from_parts(self, flat: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``named_parts``, into ``flat``."""
        for name, part in zip(self.names, self.split(flat)):
            part.copy_(local_tensor(parts[name]))

    def with_global_shape(self, name: str, value: Any) -> Any:
        """A shard of a parameter as the DTensor that the parameter is; anything else as it is."""
        parameter = self.view.parameters[name]
        if isinstance(value, torch.Tensor) and value.dim() == parameter.dim() and value.dim() > 0:
            return like(parameter, value)
        return value


@torch.no_grad()
def refresh(copies: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> bool:
    """Copy each source into its copy; whether that changed any."""
    changed = False
    for copy, source in zip(copies, sources, strict=True):
        source = source.to(copy)
        if not torch.equal(copy, source):
            copy.copy_(source)
            changed = True
    return changed


def _copy_checked(name: str, own: torch.Tensor, theirs: torch.Tensor) -> None:
    if own.shape != theirs.shape:
        raise ValueError(f"the saved or received {name} has shape {tuple(theirs.shape)}, ours {tuple(own.shape)}")
    own.copy_(theirs)
