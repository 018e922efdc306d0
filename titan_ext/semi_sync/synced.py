"""A row of the plan bound to this rank's tensors: what it sends and how it takes what comes back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.semi_sync.outer_optimizer import OuterSettings, build_outer_optimizer, work_on
from titan_ext.semi_sync.plan import PARAMETERS, SyncRow
from titan_ext.semi_sync.views import ModelView, like, local_tensor


class SyncedRow:
    """The local part of one synced state of one fragment, possibly empty on this rank.

    A row of parameters keeps the last committed global value in fp32; a row of an optimizer
    state does not, for its mean replaces the local value at once.

    Args:
        row: the plan's row.
        names: the parameters of the row's fragment that this rank holds, in an order equal at all sites.
        view: this rank's tensors.
        outer_name: name of the outer optimizer, used when ``row.outer_optimizer``.
        outer_settings: its hyper-parameters.
        lossless: whether what is sent arrives exactly.
        global_device: where the global copy lives; None is where the parameters are.
        own_outer: an optimizer over the model's parameters to use instead, see ``work_on``.
    """

    def __init__(
        self,
        row: SyncRow,
        names: Sequence[str],
        view: ModelView,
        *,
        outer_name: str,
        outer_settings: OuterSettings,
        lossless: bool = True,
        global_device: torch.device | None = None,
        own_outer: Optimizer | None = None,
    ) -> None:
        self.row = row
        self.names = list(names)
        self._view = view
        locals_ = self._locals()
        self._shapes = [tensor.shape for tensor in locals_]
        self.numel = sum(tensor.numel() for tensor in locals_)
        self.device = global_device or (locals_[0].device if locals_ else torch.device("cpu"))
        # The mean of values is exact for one site and cheaper. A late landing must not undo the
        # steps taken meanwhile, and a codec's error must be one of the difference, not of the value.
        self.sends_difference = row.state == PARAMETERS and (row.outer_optimizer or row.delay > 0 or not lossless)
        self.global_flat: torch.Tensor | None = None
        self.global_parts: list[torch.Tensor] = []
        self.outer: Optimizer | None = None
        if row.state == PARAMETERS:
            self.global_flat = torch.empty(self.numel, dtype=torch.float32, device=self.device)
            self.global_parts = self.split(self.global_flat)
            self.take_local_as_global()
            if own_outer is not None and self.numel:
                self.outer = own_outer
                work_on(own_outer, [view.parameters[name] for name in self.names], self.global_parts)
            elif row.outer_optimizer and self.numel:
                self.outer = build_outer_optimizer(outer_name, self.global_parts, outer_settings)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat ``[numel]`` tensor in the shapes of the row's local tensors."""
        parts, start = [], 0
        for shape in self._shapes:
            parts.append(flat[start : start + shape.numel()].view(shape))
            start += shape.numel()
        return parts

    @torch.no_grad()
    def write(self, out: torch.Tensor) -> None:
        """Fill ``out`` (fp32 ``[numel]``) with this site's contribution: values, or the pseudo-gradient."""
        if not self.numel:
            return
        torch._foreach_copy_(self.split(out), self._locals())
        if self.sends_difference:
            torch.sub(self.global_flat, out, out=out)

    @torch.no_grad()
    def apply(self, mean: torch.Tensor) -> None:
        """Take the mean over the sites (fp32 ``[numel]``, overwritten) and set the local tensors."""
        if not self.numel:
            return
        if self.row.state != PARAMETERS:
            torch._foreach_copy_(self._locals(), self.split(mean))
            return
        if self.outer is not None:
            self._outer_step(mean)
        elif self.sends_difference:
            self.global_flat.sub_(mean)
        else:
            self.global_flat.copy_(mean)
        self._mix_into_local()

    @torch.no_grad()
    def take_local_as_global(self) -> None:
        """Start from the local parameters."""
        if self.numel:
            torch._foreach_copy_(self.global_parts, self._locals())

    @torch.no_grad()
    def reset_local_to_global(self) -> None:
        """Drop local work; rows of optimizer states have no global value and stay."""
        if self.global_parts and self.numel:
            torch._foreach_copy_(self._locals(), self.global_parts)

    def shared_state(self) -> dict[str, Any]:
        """Global values and outer optimizer state by parameter name: local tensors, not copies."""
        if self.global_flat is None:
            return {}
        return {
            name: {"global": part, **self._outer_state(part)}
            for name, part in zip(self.names, self.global_parts, strict=True)
        }

    @torch.no_grad()
    def load_shared_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take another site's shared state of the same shards, and its parameters as our own.

        Local work since the last commit is dropped: the members may have averaged it already, and
        counting it twice would be worse than losing it.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        self.load_checkpoint_state(state)
        self.reset_local_to_global()

    def checkpoint_state(self) -> dict[str, Any]:
        """The shared state with global shapes (DTensors where the parameters are), for DCP."""
        return {
            name: {key: self._with_global_shape(name, value) for key, value in values.items()}
            for name, values in self.shared_state().items()
        }

    def load_checkpoint_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore what ``checkpoint_state`` returned; the local parameters are restored elsewhere."""
        for name, part in zip(self.names, self.global_parts):  # no parts: nothing global is kept
            self._load_one(name, part, state)

    def described(self) -> list[tuple[str, torch.Tensor]]:
        """Name and local tensor of everything the row covers on this rank."""
        return list(zip(self.names, self._locals(), strict=True))

    def named_parts(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat ``[numel]`` tensor as parameters' shards by name, with global shapes."""
        return {name: self._with_global_shape(name, part) for name, part in zip(self.names, self.split(flat))}

    @torch.no_grad()
    def fill_from_parts(self, flat: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``named_parts``, into ``flat``."""
        for name, part in zip(self.names, self.split(flat)):
            part.copy_(local_tensor(parts[name]))

    def _with_global_shape(self, name: str, value: Any) -> Any:
        parameter = self._view.parameters[name]
        if isinstance(value, torch.Tensor) and value.dim() == parameter.dim() and value.dim() > 0:
            return like(parameter, value)
        return value

    def _locals(self) -> list[torch.Tensor]:
        return self._view.tensors(self.row.state, self.names)

    def _outer_step(self, mean: torch.Tensor) -> None:
        for part, gradient in zip(self.global_parts, self.split(mean), strict=True):
            part.grad = gradient
        self.outer.step()
        for part in self.global_parts:
            part.grad = None

    def _mix_into_local(self) -> None:
        if self.row.mixing == 0.0:
            torch._foreach_copy_(self._locals(), self.global_parts)
            return
        for local, part in zip(self._locals(), self.global_parts, strict=True):
            local.copy_(torch.lerp(part, local.to(part), self.row.mixing))

    def _outer_state(self, part: torch.Tensor) -> dict[str, Any]:
        return {} if self.outer is None else {f"outer.{key}": value for key, value in self.outer.state[part].items()}

    def _load_one(self, name: str, part: torch.Tensor, state: Mapping[str, Mapping[str, Any]]) -> None:
        if name not in state:
            raise ValueError(f"the peer's shared state lacks {name}")
        for key, value in state[name].items():
            if isinstance(value, torch.Tensor):
                value = local_tensor(value)
            if key == "global":
                _copy_checked(name, part, value)
            elif self.outer is not None:
                own = self.outer.state[part]
                key = key.removeprefix("outer.")
                if isinstance(own.get(key), torch.Tensor):
                    _copy_checked(f"{name} ({key})", own[key], value)
                else:
                    own[key] = value


def _copy_checked(name: str, own: torch.Tensor, theirs: torch.Tensor) -> None:
    if own.shape != theirs.shape:
        raise ValueError(f"the peer's {name} has shape {tuple(theirs.shape)}, ours {tuple(own.shape)}")
    own.copy_(theirs)
