"""bfloat16 parameters under optimizers that compute in fp32: moments are kept in fp32, parameters are rounded at random.

In bfloat16 a moment with beta above 0.998 never decays, and a step of less than half a unit in the last place never
moves a parameter: both are rounded away, each time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from titan_ext.optim.rounding import copy_randomly, seed_of, shard_of
from titan_ext.optim.shards import local, local_gradient


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What is computed and kept in: float32, or the tensor's dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard in the working dtype: the shard itself where it has that."""
    return local(tensor).to(working_dtype(tensor))


def store(parameter: torch.Tensor, worked: torch.Tensor, *seeds: int) -> None:
    """Write what ``widened`` gave, and was worked on, back to the parameter.

    Args:
        parameter: to be written to.
        worked: this rank's shard.
        *seeds: of the noise: the step, and the parameter's place among others.
    """
    if worked.dtype != parameter.dtype:
        copy_randomly(local(parameter), worked, seed_of(*seeds, *shard_of(parameter)))


def adamw_step(
    states: Mapping[torch.Tensor, dict[str, Any]],
    parameters: Sequence[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW on local shards; ``states`` gets what it lacks: ``step``, ``exp_avg``, ``exp_avg_sq``."""
    if not parameters:
        return
    for parameter in parameters:
        if not states[parameter]:
            dtype = working_dtype(parameter)
            states[parameter]["step"] = torch.zeros(())
            states[parameter]["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            states[parameter]["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
    worked, own = [widened(each) for each in parameters], [states[each] for each in parameters]
    adamw(
        worked,
        [local_gradient(each).to(wide.dtype) for each, wide in zip(parameters, worked, strict=True)],
        [local(state["exp_avg"]) for state in own],
        [local(state["exp_avg_sq"]) for state in own],
        [],
        [state["step"] for state in own],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for place, (parameter, wide) in enumerate(zip(parameters, worked, strict=True)):
        if wide.dtype != parameter.dtype:
            store(parameter, wide, int(states[parameter]["step"]), place)


def keep_wide(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo what torch does to a state that is loaded: all in the parameter's dtype, ``step`` on its device.

    Args:
        optimizer: that has loaded ``saved``.
        saved: a state dict.
    """
    for group, told in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, key in zip(group["params"], told["params"], strict=True):
            state, given = optimizer.state.get(parameter, {}), saved["state"].get(key, {})
            if "step" in state:
                # torchtitan's groups say fused, which moves it; reading it would then wait for the GPU.
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() and value.dtype != working_dtype(parameter):
                    state[name] = given.get(name, value).to(parameter.device, working_dtype(parameter))
