"""Optimizers that keep one or many first momenta of a parameter: their settings, their state, and how it is stored.

The arithmetic is done on local shards, in float32 at least. A DTensor's layout does not matter to an
elementwise update, and dispatching each operation through it costs more than the operation. What is
stored in bfloat16, moments or parameters, is rounded at random: to the nearest, a moment with beta
above 0.998 would never decay.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.errors import require
from titan_ext.optim.moments import Moment
from titan_ext.optim.rounding import copy_randomly, seed_of, shard_of
from titan_ext.optim.shards import local, local_gradient

_STATE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# Elements worked on at once, which bounds the temporaries: enough to fill a GPU, or what a CPU's caches hold.
_BATCH, _CPU_BATCH = 2**25, 2**20


@dataclass(frozen=True, slots=True)
class Bucket:
    """Local tensors of some parameters that have taken ``step`` steps, in the dtype of the arithmetic."""

    step: int
    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor]
    momenta: list[list[torch.Tensor]]
    squares: list[torch.Tensor]


class MomentumOptimizer(Optimizer):
    """Settings, state and buckets; a subclass updates a bucket."""

    _momentum_key = "exp_avg_{}"
    _has_squares = True
    _corrects_bias = False
    rounds_at_random = True
    """Whether what is stored in bfloat16 is rounded so."""

    @classmethod
    def moments(cls, settings: Mapping[str, Any], name: str, shape: Sequence[int]) -> dict[str, Moment]:
        """See ``titan_ext.optim.moments``."""
        firsts = settings["betas"][:-1] if cls._has_squares else settings["betas"]
        found = {
            cls._momentum_key.format(place): Moment(1, beta, cls._corrects_bias) for place, beta in enumerate(firsts)
        }
        return found | (
            {"exp_avg_sq": Moment(2, settings["betas"][-1], cls._corrects_bias)} if cls._has_squares else {}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own values of any setting.

        Raises:
            ValueError: a hyper-parameter is outside its range; the group is not added.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for place, group in enumerate(self.param_groups):
            for (step, *_), parameters in self._buckets(group).items():
                self._step_bucket(group, step, parameters, place)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ``state_dict``; the moments get this optimizer's ``state_dtype``, whatever they were saved in."""
        dtypes = [group["state_dtype"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, saved, dtype in zip(self.param_groups, state_dict["param_groups"], dtypes, strict=True):
            group["state_dtype"] = dtype
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                self._restore(group, parameter, state_dict["state"].get(key, {}))

    def _restore(self, group: dict[str, Any], parameter: torch.Tensor, saved: dict[str, Any]) -> None:
        """Undo what torch does to loaded state: moments in the parameter's dtype, ``step`` on its device."""
        for key, value in self.state.get(parameter, {}).items():
            if key == "step":
                # torchtitan's groups say fused, which moves it; reading it would then wait for the GPU.
                self.state[parameter][key] = torch.as_tensor(value, dtype=torch.float32, device="cpu")
            elif value.dtype != _state_dtype(group, parameter):
                self.state[parameter][key] = saved.get(key, value).to(parameter.device, _state_dtype(group, parameter))

    def _check(self, group: dict[str, Any]) -> None:
        betas, omegas, extra = group["betas"], group["omegas"], int(self._has_squares)
        require(
            torch.as_tensor(group["lr"]).numel() == 1 and group["lr"] >= 0, "lr", group["lr"], "one number, at least 0"
        )
        require(group["weight_decay"] >= 0, "weight_decay", group["weight_decay"], "at least 0")
        require(group.get("eps", 1) > 0, "eps", group.get("eps"), "above 0")
        require(
            group.get("clip_exponent", 0) >= 0,
            "clip_exponent",
            group.get("clip_exponent"),
            "at least 0, inf not to clip",
        )
        mixed = isinstance(omegas, Sequence) and len(omegas) > 0 and all(each >= 0 for each in omegas)
        # Ten times 0.1 may sum to just over 1.
        mixed = mixed and math.fsum(omegas) <= 1 + 1e-9
        require(mixed, "omegas", group["omegas"], "one number of at least 0 for each momentum, together at most 1")
        wanted = len(omegas) + extra
        decays = isinstance(betas, Sequence) and len(betas) == wanted and all(0 <= each < 1 for each in betas)
        last = ", the last for the second moment" if extra else ""
        require(decays, "betas", group["betas"], f"{wanted} numbers in [0, 1): one for each of omegas{last}")
        for parameter in group["params"]:
            allowed = _state_dtype(group, parameter) in _STATE_DTYPES
            names = "torch.bfloat16, torch.float32 or torch.float64"
            fine = f"{names}, or None for parameters of these, not {parameter.dtype}"
            require(allowed, "state_dtype", group["state_dtype"], fine)

    def _keys(self, group: dict[str, Any]) -> list[str]:
        momenta = [self._momentum_key.format(place) for place in range(len(group["omegas"]))]
        return [*momenta, "exp_avg_sq"] if self._has_squares else momenta

    def _create_state(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        state, dtype = self.state[parameter], _state_dtype(group, parameter)
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for key in self._keys(group):
            state[key] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

    def _buckets(self, group: dict[str, Any]) -> dict[tuple, list[torch.Tensor]]:
        """Parameters with a gradient by what they must share: step count, dtype, device, and a batch."""
        buckets: dict[tuple, list[torch.Tensor]] = defaultdict(list)
        sizes: dict[tuple, int] = defaultdict(int)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if not self.state[parameter]:
                self._create_state(group, parameter)
            alike = int(self.state[parameter]["step"]), parameter.dtype, parameter.device
            batch = sizes[alike] // (_CPU_BATCH if parameter.device.type == "cpu" else _BATCH)
            buckets[*alike, batch].append(parameter)
            sizes[alike] += local(parameter).numel()
        return buckets

    def _step_bucket(self, group: dict[str, Any], step: int, parameters: list[torch.Tensor], place: int) -> None:
        keys, states = self._keys(group), [self.state[each] for each in parameters]
        stored = [[local(each) for each in parameters], *([local(state[key]) for state in states] for key in keys)]
        dtype = torch.promote_types(torch.promote_types(parameters[0].dtype, stored[1][0].dtype), torch.float32)
        worked = [[each.to(dtype) for each in row] for row in stored]
        gradients = [local_gradient(each).to(dtype) for each in parameters]
        momenta, squares = worked[1:], []
        if self._has_squares:
            *momenta, squares = momenta
        taken = self._update(group, Bucket(step, worked[0], gradients, momenta, squares))
        torch._foreach_add_([state["step"] for state in states], torch.tensor(float(taken)))
        if any(row[0].dtype != dtype for row in stored):
            self._store(group, parameters, stored, worked, (step, place))

    def _store(
        self,
        group: dict[str, Any],
        parameters: list[torch.Tensor],
        stored: list[list[torch.Tensor]],
        worked: list[list[torch.Tensor]],
        seeds: tuple[int, ...],
    ) -> None:
        """Copy what was worked on in another dtype to where it is kept, each tensor with noise of its own."""
        places = {parameter: place for place, parameter in enumerate(group["params"])}
        for kind, (kept, wide) in enumerate(zip(stored, worked, strict=True)):
            for parameter, to, value in zip(parameters, kept, wide, strict=True):
                if to is not value:
                    copy_randomly(to, value, seed_of(*seeds, kind, places[parameter], *shard_of(parameter)))

    def _update(self, group: dict[str, Any], bucket: Bucket) -> int:
        """Update the bucket's tensors in place; returns the steps taken, 1 or 0."""
        raise NotImplementedError


def _state_dtype(group: dict[str, Any], parameter: torch.Tensor) -> torch.dtype:
    return group["state_dtype"] or parameter.dtype
