"""Which moments an optimizer keeps of a parameter, and how they forget: for whoever averages, ages or resets them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Moment:
    """A running average of gradients (order 1) or of their squares (order 2)."""

    order: int
    decay: float
    corrected: bool = False
    """Whether the optimizer divides it by ``1 - decay ** steps``."""

    def mass(self, steps: int) -> float:
        """What its weights of the gradients of ``steps`` steps sum to: by what its mean over sites is to be weighed.

        Powers are formed by multiplications alone, so that all machines come to the same bits.
        """
        if not self.corrected:
            return 1.0 if self.order == 1 else float(steps > 0)  # ADOPT's second begins as a whole square
        power, square = 1.0, self.decay
        while steps:
            if steps & 1:
                power *= square
            square *= square
            steps >>= 1
        return 1.0 - power


def moments(kind: Any, settings: Mapping[str, Any], name: str, shape: Sequence[int]) -> dict[str, Moment]:
    """By state key, the moments that an optimizer keeps of a parameter; of one that is not known none.

    Args:
        kind: the optimizer, its class, or what builds it. One that knows better has a static method of this name,
            which takes the other arguments.
        settings: the hyper-parameters of the parameter's group.
        name: of the parameter, empty where it has none.
        shape: of the whole parameter.
    """
    if hasattr(kind, "moments"):
        return kind.moments(settings, name, shape)
    if "betas" in settings:
        return adam_moments(settings["betas"])
    momentum = settings.get("momentum")
    return {"momentum_buffer": Moment(1, momentum)} if momentum else {}


def state_shapes(
    kind: Any, settings: Mapping[str, Any], name: str, whole: torch.Size, held: torch.Size
) -> dict[str, torch.Size]:
    """By key, the shapes of the states that an optimizer keeps of a parameter, but for a step count.

    Args:
        kind: as in ``moments``. One that keeps something else than its moments, each of the parameter's shape, has a
            static method of this name, which takes the other arguments.
        settings: the hyper-parameters of the parameter's group.
        name: of the parameter.
        whole: its shape.
        held: what of it a rank holds.
    """
    if hasattr(kind, "state_shapes"):
        return kind.state_shapes(settings, name, whole, held)
    keys = [*moments(kind, settings, name, whole), *(["max_exp_avg_sq"] if settings.get("amsgrad") else [])]
    return dict.fromkeys(keys, held)


def adam_moments(betas: Sequence[float]) -> dict[str, Moment]:
    """Those of Adam and its like."""
    return {"exp_avg": Moment(1, betas[0], True), "exp_avg_sq": Moment(2, betas[1], True)}


def moments_by_parameter(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, dict[str, Moment]]]:
    """Every parameter of an optimizer with its moments."""
    for group in optimizer.param_groups:
        for name, parameter in named(group):
            yield parameter, moments(optimizer, group, name, parameter.shape)


def named(group: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """A group's parameters with their names, empty where they have none."""
    return zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True)


def steps_of(state: Mapping[str, Any]) -> int | None:
    """The step count in a parameter's state; None if the optimizer keeps none."""
    return int(state["step"]) if "step" in state else None


def set_steps(state: dict[str, Any], steps: int) -> None:
    """Overwrite the step count, in place where it is a tensor."""
    if isinstance(state["step"], torch.Tensor):
        state["step"].fill_(steps)
    else:
        state["step"] = steps
