"""torchtitan's optimizer container, open to more inner optimizers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from titan_ext.optim import DeMo, Muon
from titan_ext.platform import prepare

prepare()

from torchtitan.components.optimizer import OptimizersContainer as _TorchtitanContainer  # noqa: E402

_OURS: dict[str, Callable[..., Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Muon": Muon,
    "DeMo": DeMo,
}
_TORCHTITANS = ("Adam", "AdamW", "DistMuon")


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
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return _OURS.get(name) or _TorchtitanContainer._resolve_optimizer_factory(name)
