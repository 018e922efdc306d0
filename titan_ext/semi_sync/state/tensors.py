"""The tensors that a rule covers on one rank, as one flat stretch of memory and by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ext.semi_sync.state.views import ModelView, like, local_tensor

NamedState = dict[str, dict[str, Any]]
"""Tensors and plain values by parameter name and key."""


class BoundTensors:
    """One state of some parameters, as far as this rank holds them; it may hold none.

    Args:
        view: this rank's tensors.
        state: ``params``, or an optimizer state's key.
        names: the parameters, in an order equal at all sites.
        device: where memory of their size lies; None is where they are.
    """

    def __init__(self, view: ModelView, state: str, names: Sequence[str], device: torch.device | None = None) -> None:
        self.view = view
        self.state = state
        self.names = list(names)
        locals_ = self.locals()
        self.shapes = [tensor.shape for tensor in locals_]
        self.narrow = any(tensor.dtype.itemsize < 4 for tensor in locals_)
        """Whether some of the local tensors cannot hold fp32 values."""
        self.wide = any(tensor.dtype.itemsize > 4 for tensor in locals_)
        """Whether some of them hold more than what is exchanged."""
        self.elements = sum(tensor.numel() for tensor in locals_)
        self.device = device or (locals_[0].device if locals_ else torch.device("cpu"))
        self._pinned = self.device.type == "cpu" and any(tensor.is_cuda for tensor in locals_)

    def locals(self) -> list[torch.Tensor]:
        """The local tensors, looked up now: FSDP and checkpoint loading may replace them."""
        return self.view.tensors(self.state, self.names)

    def empty(self) -> torch.Tensor:
        """Room for one value of each parameter: fp32 ``[elements]``."""
        return torch.empty(self.elements, dtype=torch.float32, device=self.device, pin_memory=self._pinned)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``[elements]`` tensor in the shapes of the local tensors."""
        if not self.shapes:
            return []
        parts = flat[: self.elements].split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @torch.no_grad()
    def read(self, out: torch.Tensor) -> None:
        """Copy the local tensors into ``out`` (fp32 ``[elements]``)."""
        if self.elements:
            torch._foreach_copy_(self.split(out), self.locals())

    @torch.no_grad()
    def write(self, parts: Sequence[torch.Tensor]) -> None:
        """Copy ``parts``, in the shapes of the local tensors, into them."""
        if self.elements:
            torch._foreach_copy_(self.locals(), list(parts))

    @torch.no_grad()
    def refresh(self, copies: Sequence[torch.Tensor]) -> bool:
        """Copy the local tensors into copies of them; whether that changed any."""
        changed = False
        for copy, source in zip(copies, self.locals(), strict=True):
            source = source.to(copy)
            if not torch.equal(copy, source):
                copy.copy_(source)
                changed = True
        return changed

    def named(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat ``[elements]`` tensor by parameter, with global shapes."""
        return {
            name: self.with_global_shape(name, part) for name, part in zip(self.names, self.split(flat), strict=True)
        }

    @torch.no_grad()
    def fill_from_named(self, flat: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``named``, into ``flat``."""
        for name, part in zip(self.names, self.split(flat), strict=True):
            part.copy_(local_tensor(parts[name]))

    def with_global_shape(self, name: str, value: Any) -> Any:
        """A shard of a parameter as the DTensor that the parameter is; anything else as it is."""
        parameter = self.view.tensor(name)
        if isinstance(value, torch.Tensor) and value.dim() == parameter.dim() and value.dim() > 0:
            return like(parameter, value)
        return value

    def with_global_shapes(self, state: Mapping[str, Mapping[str, Any]]) -> NamedState:
        """A state of shards by parameter and key, for a distributed checkpoint."""
        return {
            name: {key: self.with_global_shape(name, value) for key, value in values.items()}
            for name, values in state.items()
        }


@torch.no_grad()
def copy_into(own: Mapping[str, Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy tensors of ``state`` into those of ``own`` with the same parameter and key.

    Raises:
        ValueError: one is missing or has another shape.
    """
    for name, values in own.items():
        for key, value in values.items():
            if key not in state.get(name, {}):
                raise ValueError(f"the saved or received state lacks {name} ({key})")
            if isinstance(value, torch.Tensor):
                theirs = local_tensor(state[name][key])
                if value.shape != theirs.shape:
                    raise ValueError(
                        f"the saved or received {name} ({key}) has shape {tuple(theirs.shape)}, ours {tuple(value.shape)}"
                    )
                value.copy_(theirs)
