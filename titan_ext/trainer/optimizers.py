"""torchtitan's optimizer container, open to more inner optimizers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from titan_ext.optim import ADOPT, QHADOPT, QHSGDM, DeMo, LowRankAdamW, Muon, QHAdamW
from titan_ext.trainer.cpu import prepare

prepare()

from torchtitan.components.optimizer import OptimizersContainer as _TorchtitanContainer  # noqa: E402

_OURS: dict[str, Callable[..., Optimizer]] = {
    "SGD": torch.optim.SGD,
    "ADOPT": ADOPT,
    "QHAdamW": QHAdamW,
    "QHADOPT": QHADOPT,
    "QHSGDM": QHSGDM,
    "Muon": Muon,
    "LowRankAdamW": LowRankAdamW,
    "DeMo": DeMo,
}
_TORCHTITANS = ("Adam", "AdamW", "DistMuon")


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
        groups = [replace(each, optimizer_kwargs=as_arguments(each.optimizer_kwargs)) for each in param_group_configs]
        return _TorchtitanContainer._build_param_groups(model, groups, impl_kwargs)
