"""Named views of what a rank holds: parameters and optimizer states, sharded or not.

Everything that knows about DTensor, pipeline parts and wrappers is here; the rest of the outer
loop sees lists of plain local tensors.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titan_ext.semi_sync.plan.plan import PARAMETERS

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")


def canonical_name(name: str) -> str:
    """A parameter's name without what activation checkpointing, compile or a wrapper put into it."""
    for wrapper in _WRAPPERS[:3]:
        name = name.replace(wrapper, "")
    return name.removeprefix(_WRAPPERS[3])


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, sharing storage; the tensor itself if it is not a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(reference: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """``local`` with the global shape and placements of ``reference``, sharing storage where devices agree."""
    if not isinstance(reference, DTensor):
        return local
    return DTensor.from_local(
        local,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def as_optimizers(optimizers: Any) -> list[Optimizer]:
    """One optimizer, a sequence of them, or a container such as torchtitan's, as a list."""
    inner = getattr(optimizers, "optimizers", None)
    if inner is not None:
        return list(inner)
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


def inner_betas(optimizers: Any) -> Sequence[float] | None:
    """Decay rates of the first group's moments; None where its optimizer has none."""
    groups = [group for optimizer in as_optimizers(optimizers) for group in optimizer.param_groups]
    return groups[0].get("betas") if groups else None


@torch.no_grad()
def materialize_state(optimizer: Optimizer) -> None:
    """Create every state tensor of a fresh optimizer, as if zero steps had been taken.

    Optimizers create state on their first step. Loading a checkpoint in place, healing a peer and
    averaging with sites that have stepped already all need it before that. A step with zero
    gradients and learning rate 0 creates it and leaves the parameters as they are.
    """
    if optimizer.state:
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = [each.grad for each in parameters]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        _rewind_step(state)


def _rewind_step(state: dict[str, Any]) -> None:
    step = state.get("step")
    if isinstance(step, torch.Tensor):
        step.zero_()
    elif step is not None:
        state["step"] = 0


class ModelView:
    """The parameters of every pipeline part on this rank and their optimizers' states, by name.

    Raises:
        ValueError: two parts hold a parameter of the same name.
    """

    def __init__(self, model_parts: Iterable[nn.Module], optimizers: Any) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        for part in model_parts:
            for name, parameter in part.named_parameters():
                name = canonical_name(name)
                if name in self.parameters:
                    raise ValueError(f"two model parts hold a parameter named {name}")
                self.parameters[name] = parameter
        self.optimizers = as_optimizers(optimizers)

    def sizes(self) -> dict[str, int]:
        """Elements of each whole (unsharded) parameter, by name, in model order."""
        return {name: parameter.numel() for name, parameter in self.parameters.items()}

    def tensors(self, state: str, names: Sequence[str]) -> list[torch.Tensor]:
        """Local tensors of one state of the named parameters, resolved now.

        They are looked up at each use because FSDP and checkpoint loading may replace them.

        Raises:
            KeyError: the inner optimizer has no such state.
        """
        if state == PARAMETERS:
            return [local_tensor(self.parameters[name]) for name in names]
        return [local_tensor(self._state_of(self.parameters[name])[self._key(state, name)]) for name in names]

    def keeps(self, state: str, name: str) -> bool:
        """Whether there is such a state of the named parameter; ``state`` may name several, the first that is kept counts."""
        return state == PARAMETERS or self._key(state, name) is not None

    def check_state(self, state: str, required: str) -> None:
        """Create the optimizer states if needed and make sure that ``state`` exists.

        Args:
            state: the state's key, or several with ``|`` between them.
            required: which trained parameters must have it: "all", "some" or "none".

        Raises:
            ValueError: naming the state and those that exist.
        """
        if state == PARAMETERS:
            return
        for optimizer in self.optimizers:
            materialize_state(optimizer)
        trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        lacking = [name for name in trained if not self.keeps(state, name)]
        if lacking and (required == "all" or (required == "some" and lacking == trained)):
            states = self._state_of(self.parameters[lacking[0]])
            known = [key for key, value in states.items() if isinstance(value, torch.Tensor) and value.dim()]
            raise ValueError(f"the inner optimizer keeps no state {state!r} for {lacking[0]}; it keeps {known}")

    def set_optimizer_step(self, step: int) -> None:
        """Set the step count of every optimizer state, which bias correction goes by."""
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"].fill_(step)
                elif "step" in state:
                    state["step"] = step

    @torch.no_grad()
    def reset_optimizers(self) -> None:
        """Every state tensor to zero, as before the first step."""
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
                _rewind_step(state)

    def _key(self, state: str, name: str) -> str | None:
        states = self._state_of(self.parameters[name])
        return next((key for key in state.split("|") if key in states), None)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}
