"""Maximal update parametrisation: one learning rate for all widths (Tensor Programs V, arXiv 2203.03466, table 3).

A model that is m times as wide as the one that was tuned starts from smaller matrices and takes smaller steps in them:

============  =========================  ================
matrix        standard deviation         learning rate
============  =========================  ================
embedding     as it is                   as it is
hidden        ``init_std / sqrt(m)``     ``1 / m``
head          ``head_std / m``           ``1 / m``
============  =========================  ================

A branch of the residual stream that counts less in a deeper model is its last matrix times a factor. Adam's steps do not
see a gradient's scale, so the factor is one of the matrix's standard deviation and of its learning rate.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import nn
from torchtitan.models.common import Linear
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from titan_ext.models.power_linear import put

_BRANCH_ENDS = ("wo", "w2")
"""Last parts of the names of matrices that write to the residual stream."""
_CUT = 3.0  # of normal distributions, in standard deviations


class ScaledLinear(Linear):
    """A linear layer whose learning rate is a multiple of the optimizer's."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        lr_multiplier: float = 1.0
        """Of the learning rate of the layer's parameters."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.lr_multiplier = config.lr_multiplier


class ScaledAttention(GQAttention):
    """Attention whose logits are scaled by another number than one over the root of a head's width."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        logit_scale: float = 1.0
        """What products of queries and keys are multiplied by."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scaling = config.logit_scale


class MupConverter(ModelConfigConverter):
    """Gives a decoder the initialisation, learning rates and attention scale of muP."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        base_dim: int = 256
        """Width of the model whose learning rate was tuned; this one has it too, at any width."""

        base_layers: int = 0
        """Its depth: branches of the residual stream count by it over the depth (CompleteP, arXiv 2505.01618); 0: depth
        changes nothing."""

        base_head_dim: int = 0
        """Width of its heads, by which attention logits are scaled where heads grow; 0: heads are as wide as its own."""

        init_std: float = 0.02
        """Standard deviation of its hidden matrices."""

        head_std: float = 0.0
        """Standard deviation of its head; 0: one over the root of ``base_dim``."""

    def __init__(self, config: Config, **parts: Any) -> None:
        for key, least in (("base_dim", 1), ("base_layers", 0), ("base_head_dim", 0)):
            if getattr(config, key) < least:
                raise ValueError(f"{key} = {getattr(config, key)}: must be at least {least}")
        if not config.init_std > 0 or config.head_std < 0:
            raise ValueError(f"init_std = {config.init_std}, head_std = {config.head_std}: must be above 0")
        self.config = config

    @property
    def keeps_weights(self) -> bool:
        """Whether a reader of the weights alone computes what the model does: not where logits are scaled by a rule."""
        return not self.config.base_head_dim

    def convert(self, model_config: Module.Config) -> Module.Config:
        """The model under muP, in place.

        Raises:
            ValueError: the model has no such rules.
        """
        model: Any = model_config
        _check(model)
        times = model.dim / self.config.base_dim
        branch = self.config.base_layers / len(model.layers) if self.config.base_layers else 1.0
        for name, linear, parent, attribute in list(model.traverse(Linear.Config)):
            if name == "lm_head":
                std, rate = (self.config.head_std or self.config.base_dim**-0.5) / times, 1 / times
            else:
                part = branch if name.rpartition(".")[2] in _BRANCH_ENDS else 1.0
                std, rate = part * self.config.init_std / times**0.5, part / times
            put(parent, attribute, _scaled(linear, std, rate))
        if self.config.base_head_dim:
            for _, attention, parent, attribute in list(model.traverse(GQAttention.Config)):
                put(parent, attribute, self._with_scale(attention, model.dim))
        return model_config

    def _with_scale(self, attention: GQAttention.Config, dim: int) -> GQAttention.Config:
        width = attention.head_dim or dim // attention.n_heads
        kept = {each.name: getattr(attention, each.name) for each in fields(attention) if each.init}
        return ScaledAttention.Config(**kept, logit_scale=self.config.base_head_dim**0.5 / width)


def _check(model: Any) -> None:
    if not hasattr(model, "layers") or not hasattr(model, "dim"):
        raise ValueError(f"{model._owner.__name__} has no layers and width to go by")
    if getattr(model, "enable_weight_tying", False):
        raise ValueError("muP needs a head of its own: enable_weight_tying = false")
    if any(model.traverse(MoE.Config)):
        raise ValueError(f"{model._owner.__name__} has experts, for whose matrices there is no rule")
    other = next(
        (type(config) for _, config, _, _ in model.traverse(Linear.Config) if type(config) is not Linear.Config), None
    )
    if other is not None:
        raise ValueError(f"{other._owner.__name__} layers have no rule: muP must come first, and alone")
    for _, attention, _, _ in model.traverse(GQAttention.Config):
        if type(attention) is not GQAttention.Config:
            raise ValueError(f"{type(attention)._owner.__name__} scales its logits by a rule of its own")


def _scaled(linear: Linear.Config, std: float, lr_multiplier: float) -> ScaledLinear.Config:
    kept: dict[str, Any] = {each.name: getattr(linear, each.name) for each in fields(linear) if each.init}
    kept["param_init"] = {**(linear.param_init or {}), "weight": _normal(std)}
    return ScaledLinear.Config(**kept, lr_multiplier=lr_multiplier)


def _normal(std: float) -> Callable[..., Any]:
    return partial(nn.init.trunc_normal_, std=std, a=-_CUT * std, b=_CUT * std)


def lr_multipliers(model: nn.Module) -> dict[int, float]:
    """By the identity of a parameter what its learning rate is multiplied by; those that are not there have 1."""
    return {
        id(parameter): module.lr_multiplier
        for module in model.modules()
        if isinstance(module, ScaledLinear)
        for parameter in module.parameters(recurse=False)
    }
