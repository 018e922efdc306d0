"""torchtitan's optimizer container, open to more inner optimizers."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer as _TorchtitanContainer

from titan_ext.models.mup import lr_multipliers
from titan_ext.optim import ADOPT, QHADOPT, QHSGDM, SGD, DeMo, LowRankAdamW, Muon, QHAdamW

_OURS: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "ADOPT": ADOPT,
    "QHAdamW": QHAdamW,
    "QHADOPT": QHADOPT,
    "QHSGDM": QHSGDM,
    "Muon": Muon,
    "LowRankAdamW": LowRankAdamW,
    "DeMo": DeMo,
}
_TORCHTITANS = ("Adam", "AdamW", "DistMuon")

# What a group of parameters holds beside hyper-parameters; the schedule sets its lr, from the peak in initial_lr.
_OTHER_ENTRIES = ("params", "param_names", "lr")
_NAMES = {"initial_lr": "lr"}
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable", "maximize"}


def _implementation(group: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What differs for a group from the implementation asked for."""
    takes_shards = getattr(_OURS.get(group.optimizer_name), "fused_takes_shards", True)
    return {"fused": False, "foreach": True} if asked["fused"] and not takes_shards else {}


def as_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``optimizer_kwargs`` as an optimizer takes them: a ``state_dtype`` by name becomes torch's dtype."""
    found = dict(kwargs)
    if isinstance(found.get("state_dtype"), str):
        found["state_dtype"] = getattr(torch, found["state_dtype"])
    return found


class OptimizersContainer(_TorchtitanContainer):
    """Resolves the names of ``[optimizer]``: torchtitan's own and those registered here."""

    @dataclass(kw_only=True, slots=True)
    class Config(_TorchtitanContainer.Config):
        pass

    leave_out_next_step = False
    """Whether the next step comes to nothing but its hooks, to which the outer loop may belong."""

    _saved: Sequence[Mapping[str, Any]] = ()  # hyper-parameters of the checkpoint that was loaded, by group

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step of every optimizer, unless it is to be left out."""
        if self.leave_out_next_step:
            self.leave_out_next_step = False
            return None
        return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """States as they were saved; hyper-parameters stay as they are configured now."""
        configured = self._hyper_parameters()
        super().load_state_dict(state_dict)
        self._saved = self._hyper_parameters()
        for group, chosen in zip(self._groups(), configured, strict=True):
            group.update(chosen)

    @torch.no_grad()
    def begin_anew(self) -> None:
        """Every state as before the first step; torchtitan makes them, to look at, by a step that counts."""
        for state in (state for each in self.optimizers for state in each.state.values()):
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.zero_()
                elif key == "step":
                    state[key] = 0

    def changed_since_saved(self) -> list[str]:
        """In words: hyper-parameters that are not those of the loaded checkpoint; what they are now counts."""
        found: set[str] = set()
        # Without a checkpoint there are none.
        for saved, now in zip(self._saved, self._hyper_parameters(), strict=False):
            changed = (key for key in saved.keys() - _IMPLEMENTATION if key in now and saved[key] != now[key])
            found |= {f"{_NAMES.get(key, key)} was {saved[key]} in the checkpoint, is {now[key]}" for key in changed}
        return sorted(found)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for each in self.optimizers for group in each.param_groups]

    def _hyper_parameters(self) -> list[dict[str, Any]]:
        return [{key: each for key, each in group.items() if key not in _OTHER_ENTRIES} for group in self._groups()]

    @staticmethod
    def optimizer_names() -> list[str]:
        """Names that ``optimizer_name`` accepts."""
        return [*_TORCHTITANS, *_OURS]

    @staticmethod
    def own_optimizers() -> dict[str, Callable[..., Optimizer]]:
        """Those that torchtitan does not have, by name."""
        return dict(_OURS)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return _OURS.get(name) or _TorchtitanContainer._resolve_optimizer_factory(name)

    @staticmethod
    def _build_param_groups(model: Any, param_group_configs: list, impl_kwargs: dict[str, Any]) -> tuple[dict, dict]:
        # A config names dtypes: torchtitan writes it as JSON (debug.print_config), which has no torch.dtype.
        groups = [
            replace(each, optimizer_kwargs=_implementation(each, impl_kwargs) | as_arguments(each.optimizer_kwargs))
            for each in param_group_configs
        ]
        built, patterns = _TorchtitanContainer._build_param_groups(model, groups, impl_kwargs)
        return _by_rate(built, patterns, lr_multipliers(model))


def _default_rate(name: str) -> Any:
    return inspect.signature(OptimizersContainer._resolve_optimizer_factory(name)).parameters["lr"].default


def _by_rate(groups: dict, patterns: dict, multipliers: Mapping[int, float]) -> tuple[dict, dict]:
    """The groups, each divided by what its parameters' learning rates are multiplied by."""
    divided: dict[str, list] = {name: [] for name in groups}
    found: dict[str, list] = {name: [] for name in groups}
    for name, group, pattern in ((n, g, p) for n in groups for g, p in zip(groups[n], patterns[n], strict=True)):
        rates = [multipliers.get(id(each), 1.0) for each in group["params"]]
        for rate in dict.fromkeys(rates):
            chosen = {
                key: [each for each, own in zip(group[key], rates, strict=True) if own == rate]
                for key in ("params", "param_names")
            }
            scaled = {} if rate == 1.0 else {"lr": rate * group.get("lr", _default_rate(name))}
            divided[name].append({**group, **chosen, **scaled})
            found[name].append(pattern)
    return divided, found
