"""Linear layers whose weight is a power of what is stored (SparsyFed, arXiv 2504.05153, section 3.2).

A stored weight w acts as ``sign(w) |w| ** exponent``: large weights grow, small ones shrink, and the gradient of one at zero
is zero. Where weights are zero, the activations that the gradient of the weight is computed from are thinned out to the
same share.

Shapes: B batch, L sequence, I and O features in and out.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.models.common import Linear
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module


class PowerLinear(Linear):
    """A linear layer under a power.

    Under tensor parallelism a rank goes by its own part of the weight for the share of activations.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        exponent: float = 1.25
        """Of the stored weight's magnitude; 1 is an ordinary layer."""

        prune_activations: bool = True
        """Whether small activations are left out of the weight's gradient, as many as weights are zero."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.exponent = config.exponent
        self.prune_activations = config.prune_activations

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[B, L, I]`` to ``[B, L, O]``."""
        weight = power(self.weight, self.exponent)
        if not (self.training and self.prune_activations and torch.is_grad_enabled()):
            return F.linear(input, weight, self.bias)
        return _PrunedGradient.apply(input, weight, self.bias)


def power(weight: torch.Tensor, exponent: float) -> torch.Tensor:
    """What a stored weight acts as."""
    return weight if exponent == 1.0 else weight.sign() * weight.abs().pow(exponent)


class _PrunedGradient(torch.autograd.Function):
    """A linear layer, forward exactly; the weight's gradient sees only the largest activations."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(thinned(input, weight), weight)
        ctx.has_bias = bias is not None
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        (gradient,) = gradients
        input, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        bias = flat.sum(0) if ctx.has_bias else None
        return gradient @ weight, flat.T @ input.flatten(0, -2), bias


def thinned(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The activations of a batch with the smallest set to zero, the same share of them as of the weights is zero."""
    magnitudes = input.abs()
    numel = magnitudes.numel()
    alive = weight.count_nonzero() / weight.numel()
    kept = (alive.clamp_min(1e-7) * numel).ceil().long().clamp(1, numel)
    # By a tensor's value, without a wait for the host.
    least = magnitudes.flatten().sort().values[(numel - kept).view(1)]
    return input.masked_fill(magnitudes < least, 0.0)


class PowerLinearConverter(ModelConfigConverter):
    """Puts the matrices of a model under a power."""

    keeps_weights = False
    """Stored weights mean something else than in Hugging Face's format."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        exponent: float = 1.25
        """Of the stored weights' magnitude (the paper's beta), at least 1."""

        prune_activations: bool = True
        """Whether small activations are left out of the weights' gradients, as many as weights are zero."""

        modules: list[str] | None = None
        """Patterns of the linear layers; by default those of attention and feed-forward."""

    def __init__(self, config: Config, **parts: Any) -> None:
        if not config.exponent >= 1:
            raise ValueError(f"exponent = {config.exponent}: must be at least 1")
        self.config = config

    def convert(self, model_config: Module.Config) -> Module.Config:
        """The model with other linear layers, in place.

        Raises:
            ValueError: no layer matches.
        """
        patterns = ["layers.*.attention.*", "layers.*.feed_forward.*"]
        patterns = patterns if self.config.modules is None else self.config.modules
        found = 0
        for name, config, parent, attribute in list(model_config.traverse(Linear.Config)):
            if type(config) is Linear.Config and any(fnmatchcase(name, pattern) for pattern in patterns):
                found += 1
                put(parent, attribute, self._under_power(config))
        if not found:
            raise ValueError(f"modules = {patterns}: no linear layer matches that no other converter has changed")
        return model_config

    def _under_power(self, config: Linear.Config) -> PowerLinear.Config:
        kept: dict[str, Any] = {each.name: getattr(config, each.name) for each in fields(config) if each.init}
        settings: dict[str, Any] = {
            "exponent": self.config.exponent,
            "prune_activations": self.config.prune_activations,
        }
        initial = config.param_init or {}
        if "weight" in initial:
            kept["param_init"] = initial | {"weight": _rooted(initial["weight"], self.config.exponent)}
        return PowerLinear.Config(**kept, **settings)


def _rooted(initialise: Callable[[torch.Tensor], Any], exponent: float) -> Callable[[torch.Tensor], None]:
    """An initialisation after which the weights that act are distributed as they would be without the power."""

    def initialise_under_power(weight: torch.Tensor) -> None:
        initialise(weight)
        with torch.no_grad():
            weight.copy_(power(weight, 1 / exponent))

    return initialise_under_power


def put(parent: Any, attribute: Any, value: Any) -> None:
    """Put a part into its parent, where traversing a model's config found another."""
    if isinstance(parent, list):
        parent[attribute] = value
    else:
        setattr(parent, attribute, value)
