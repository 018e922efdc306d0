"""A residual stream in fp32 around blocks that compute in a narrower type."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchtitan.models.common import RMSNorm
from torchtitan.models.common.decoder import Decoder


class NarrowingRMSNorm(RMSNorm):
    """The norm of an fp32 stream, given to the matrices behind it in the type that they compute in."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[…, dim]`` in any type; returns the weight's type."""
        normed = F.rms_norm(input, self.normalized_shape, self.weight.to(input.dtype), self.eps)
        return normed.to(self.weight.dtype)


def use_fp32_stream(model_config: Decoder.Config) -> None:
    """Let every norm between the stream and matrices narrow its output, in place."""
    for owner in model_config.layers:
        owner.attention_norm = _narrowing(owner.attention_norm)
        owner.ffn_norm = _narrowing(owner.ffn_norm)
    model_config.norm = _narrowing(model_config.norm)


def _narrowing(norm: RMSNorm.Config) -> NarrowingRMSNorm.Config:
    return NarrowingRMSNorm.Config(normalized_shape=norm.normalized_shape, eps=norm.eps, param_init=norm.param_init)
