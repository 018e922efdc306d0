"""Named views of what a rank holds: parameters and optimizer states, sharded or not.

Everything that knows about DTensor, pipeline parts and wrappers is here; the rest of the outer
loop sees lists of plain local tensors.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titan_ext.optim.moments import Moment, moments, moments_by_parameter, named, set_steps, steps_of
from titan_ext.semi_sync.plan.rule import PARAMETERS

logger = logging.getLogger(__name__)

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


def with_own_storage(value: Any) -> Any:
    """A nested state whose DTensors on a stretch of a larger storage lie in host memory of their own instead.

    torch's asynchronous checkpoints take a DTensor's offset for a storage and then find none.
    """
    if isinstance(value, Mapping):
        return {key: with_own_storage(each) for key, each in value.items()}
    if not isinstance(value, DTensor) or value.storage_offset() == 0:
        return value
    return like(value, torch.empty(value.to_local().shape, dtype=value.dtype).copy_(value.to_local()))


def as_optimizers(optimizers: Any) -> list[Optimizer]:
    """One optimizer, a sequence of them, or a container such as torchtitan's, as a list."""
    inner = getattr(optimizers, "optimizers", None)
    if inner is not None:
        return list(inner)
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


@torch.no_grad()
def materialize_state(optimizer: Optimizer) -> None:
    """Create every state tensor that an optimizer does not have yet, as if zero steps had been taken.

    Optimizers create state on their first step. Loading a checkpoint in place, healing a peer and
    averaging with sites that have stepped already all need it before that. A step with zero
    gradients, learning rate 0 and no weight decay, which some optimizers add to the gradient, creates it and leaves
    the parameters as they are.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    fresh = {each for each in parameters if each not in optimizer.state}
    if not fresh:
        return
    settings: list[dict[str, Any]] = [
        {key: group[key] for key in ("lr", "weight_decay") if key in group} for group in optimizer.param_groups
    ]
    gradients = [each.grad for each in parameters]
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update((key, torch.zeros_like(v) if isinstance(v, torch.Tensor) else 0.0) for key, v in kept.items())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter in fresh else None
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    for parameter in fresh:
        _rewind_step(optimizer.state.get(parameter, {}))


def kept_buffers(part: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """By name the module and the key of each buffer that the part's checkpoint holds."""
    found = {}
    for prefix, module in part.named_modules():
        for key, _ in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                found[canonical_name(f"{prefix}.{key}".lstrip("."))] = (module, key)
    return found


def _rewind_step(state: dict[str, Any]) -> None:
    step = state.get("step")
    if isinstance(step, torch.Tensor):
        step.zero_()
    elif step is not None:
        state["step"] = 0


def moments_kept(optimizers: Any) -> list[tuple[int, dict[str, Moment]]]:
    """Elements and moments of every parameter of the optimizers on this rank."""
    return [
        (parameter.numel(), kept)
        for optimizer in as_optimizers(optimizers)
        for parameter, kept in moments_by_parameter(optimizer)
    ]


class ModelView:
    """The parameters and buffers of every pipeline part on this rank and the optimizers' states, by name.

    Raises:
        ValueError: two parts hold a parameter of the same name, or one is trained that fp32 cannot hold.
    """

    def __init__(self, model_parts: Iterable[nn.Module], optimizers: Any) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.own_buffers: list[str] = []
        """Names of the buffers that a checkpoint keeps and that have no mean: every site keeps its own."""
        self._buffers: dict[str, tuple[nn.Module, str]] = {}
        for part in model_parts:
            for name, (module, key) in kept_buffers(part).items():
                if module.get_buffer(key).is_floating_point():
                    self._buffers[name] = module, key
                else:
                    self.own_buffers.append(name)
                    logger.warning("%s is no floating-point tensor: every site keeps its own", name)
            for name, parameter in part.named_parameters():
                name = canonical_name(name)
                if name in self.parameters:
                    raise ValueError(f"two model parts hold a parameter named {name}")
                if parameter.requires_grad and parameter.is_complex():
                    raise ValueError(f"{name} is complex, and what sites exchange is real: make it a real parameter")
                self.parameters[name] = parameter
        self.optimizers = as_optimizers(optimizers)
        self._owners: dict[torch.Tensor, tuple[Optimizer, dict[str, Any], str]] = {}

    def sizes(self) -> dict[str, int]:
        """Elements of each whole (unsharded) parameter, by name, in model order."""
        return {name: parameter.numel() for name, parameter in self.parameters.items()}

    def frozen(self) -> list[str]:
        """Names of the parameters that are not trained."""
        return [name for name, parameter in self.parameters.items() if not parameter.requires_grad]

    def buffers(self) -> list[str]:
        """Names of the buffers that a checkpoint keeps, floating-point ones."""
        return list(self._buffers)

    def tensor(self, name: str) -> torch.Tensor:
        """The named parameter or buffer; a buffer is looked up at each use, for modules put new ones in its place."""
        if name in self.parameters:
            return self.parameters[name]
        module, key = self._buffers[name]
        return module.get_buffer(key)

    def tensors(self, state: str, names: Sequence[str]) -> list[torch.Tensor]:
        """Local tensors of one state of the named parameters, resolved now.

        They are looked up at each use because FSDP and checkpoint loading may replace them.

        Raises:
            KeyError: the inner optimizer has no such state.
        """
        if state == PARAMETERS:
            return [local_tensor(self.tensor(name)) for name in names]
        return [local_tensor(self._state_of(self.parameters[name])[self.key(state, name)]) for name in names]

    def keeps(self, state: str, name: str) -> bool:
        """Whether there is such a state of the named parameter; ``state`` may name several, the first that is kept counts."""
        return state == PARAMETERS or self.key(state, name) is not None

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

    def owner(self, name: str) -> tuple[Optimizer | None, dict[str, Any]]:
        """The optimizer of a parameter, and its group there."""
        return self._owner(name)[:2]

    def moments(self, name: str) -> dict[str, Moment]:
        """The moments that the optimizer keeps of the named parameter, by key; those that are known."""
        optimizer, group, own_name = self._owner(name)
        known = moments(optimizer, group, own_name, self.parameters[name].shape) if optimizer is not None else {}
        return {key: moment for key, moment in known.items() if key in self._state_of(self.parameters[name])}

    def moment(self, state: str, name: str) -> Moment | None:
        """The moment that ``state`` is of the named parameter; None if it is none that is known."""
        return self.moments(name).get(self.key(state, name))

    def shared_states(self, name: str) -> list[str]:
        """Keys of the states that the optimizer keeps of the named parameter, but for counts and what is a worker's own."""
        own = getattr(self._owner(name)[0], "own_states", ())
        return [
            key
            for key, value in self._state_of(self.parameters[name]).items()
            if isinstance(value, torch.Tensor) and key != "step" and key not in own
        ]

    def steps(self, name: str) -> int | None:
        """Steps that the optimizer has taken with the named parameter; None if it does not count them."""
        return steps_of(self._state_of(self.parameters[name]))

    def set_steps(self, name: str, steps: int) -> None:
        """Overwrite them."""
        set_steps(self._state_of(self.parameters[name]), steps)

    @torch.no_grad()
    def reset_optimizers(self) -> None:
        """Every state tensor to zero, as before the first step."""
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
                _rewind_step(state)

    @torch.no_grad()
    def reset_broken_states(self) -> None:
        """The states of parameters of which one holds a NaN or an infinity, to zero."""
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
                if not all(bool(torch.isfinite(local_tensor(value)).all()) for value in tensors):
                    for value in tensors:
                        value.zero_()
                    _rewind_step(state)

    def key(self, state: str, name: str) -> str | None:
        """Which of the keys in ``state`` is kept of the named parameter."""
        states = self._state_of(self.parameters[name])
        return next((key for key in state.split("|") if key in states), None)

    def _owner(self, name: str) -> tuple[Optimizer | None, dict[str, Any], str]:
        """The optimizer of a parameter, its group there, and the name it has in it."""
        if not self._owners:
            self._owners = {
                parameter: (optimizer, group, own_name)
                for optimizer in self.optimizers
                for group in optimizer.param_groups
                for own_name, parameter in named(group)
            }
        return self._owners.get(self.parameters[name], (None, {}, ""))

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        for optimizer in self.optimizers:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}


def warn_of_rounding(view: ModelView) -> None:
    """Say so where an optimizer rounds narrow parameters to the nearest, which loses what is small every time."""
    for name, parameter in view.parameters.items():
        optimizer, _ = view.owner(name)
        if optimizer is not None and parameter.dtype.itemsize < 4 and not getattr(optimizer, "rounds_at_random", False):
            logger.warning(
                "%s keeps %s in %s and rounds to the nearest: small steps do nothing, and moments with a beta above 0.998 "
                "never decay; the optimizers of titan_ext.optim round at random",
                type(optimizer).__name__,
                name,
                parameter.dtype,
            )
            return
