"""The baseline "Depth": the recurrent-depth model (Geiping et al. 2025) in the blocks of the standard decoder.

Each iteration is given a linear map of the state beside the head's output, and its own output is normalised;
the first state is noise. Shapes: B batch, L sequence, D width.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import spmd_types as spmd
import torch
from torchtitan.models.common import Linear, RMSNorm
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_sequence_parallel_placement,
    norm_config,
)
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from titan_ext.models.abbie.model import AbbieModel, Masks

_CUT = 2.0
"""Deviations at which the noise is truncated."""


class StateNoise(Module):
    """Truncated normal noise that is a function of seed, step and position alone: the same in every layout."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        """Width of the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dim = config.dim
        self.std = math.sqrt(2 / (5 * config.dim))
        # Not an argument of forward: torchtitan places every argument on the mesh.
        self.key = 0

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """float32 ``[B, L, D]`` for int64 ``positions`` ``[B, L]``."""
        channels = torch.arange(self.dim, device=positions.device)
        uniform = _uniform(positions[..., None] * self.dim + channels, self.key)
        edge = math.erf(_CUT / math.sqrt(2))
        return self.std * math.sqrt(2) * torch.erfinv(edge * (2 * uniform - 1))


def _uniform(counters: torch.Tensor, key: int) -> torch.Tensor:
    """float32 in (0, 1) for int64 counters: the finaliser of SplitMix64 (Steele et al. 2014)."""
    bits = (counters + 1) * -0x61C8864680B583EB + key
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ _shifted(bits, shift)) * factor
    bits = bits ^ _shifted(bits, 31)
    return (_shifted(bits, 41) + 0.5).to(torch.float32) / 2**23


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right, where int64 has an arithmetic one."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


class RecurrentDepthModel(AbbieModel):
    """s_0 noise; s_{i+1} = norm(body(W [s_i, head(x)])); logits from tail(s_r)."""

    @dataclass(kw_only=True, slots=True)
    class Config(AbbieModel.Config):
        loop_modules: ClassVar[tuple[str, ...]] = ("state_noise", "adapter", "state_norm")
        """As in ``AbbieModel.Config``."""
        state_noise: StateNoise.Config
        """What the iterations start from."""
        adapter: Linear.Config
        """Joins the state and the head's output before each iteration."""
        state_norm: RMSNorm.Config
        """The norm after each iteration."""

        @property
        def varies_by_step(self) -> bool:
            """Always: each step has noise of its own."""
            return True

        def update_from_config(self, *, config, **kwargs) -> None:
            """Place the parts of this model as torchtitan places a decoder's."""
            AbbieModel.Config.update_from_config(self, config=config, **kwargs)
            enable_sp = config.parallelism.enable_sequence_parallel
            self.adapter.sharding_config = norm_config(enable_sp=enable_sp)
            self.state_norm.sharding_config = norm_config(enable_sp=enable_sp)
            stream = dense_sequence_parallel_placement() if enable_sp else dense_activation_placement(tp=spmd.I)
            whole = dense_activation_placement(tp=spmd.R)
            self.state_noise.sharding_config = ShardingConfig(
                in_src_shardings={"positions": whole},
                in_dst_shardings={"positions": whole},
                out_src_shardings=whole,
                out_dst_shardings=stream,
                local_map=LocalMapConfig(in_grad_placements=None),
            )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.state_noise = config.state_noise.build()
        self.adapter = config.adapter.build()
        self.state_norm = config.state_norm.build()

    def first_state(self, start: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Noise of this step in training; at evaluation always the same."""
        if positions is None:
            positions = torch.arange(start.shape[1], device=start.device).expand(start.shape[:2])
        step = self._step if self.training else 0
        self.state_noise.key = ((self.config.seed << 32) + step) % 2**63
        return self.state_noise(positions).to(start.dtype)

    def body_forward(
        self,
        state: torch.Tensor,
        start: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_masks: Masks = None,
        *,
        iteration: int,
    ) -> torch.Tensor:
        """The body on the adapted state and the head's output."""
        adapted = self.adapter(torch.cat((state, start), dim=-1))
        output = super().body_forward(adapted, start, positions, attention_masks, iteration=iteration)
        return self.state_norm(output)

    def next_state(self, output: torch.Tensor, state: torch.Tensor, start: torch.Tensor, *, last: bool) -> torch.Tensor:
        """The normalised output itself, the last as every other."""
        return output
