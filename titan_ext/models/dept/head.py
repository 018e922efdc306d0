"""A head of the vocabulary whose last rows stand for no token.

Shapes: B batch, L sequence, V rows of the head (or this rank's share of them).
"""

from dataclasses import dataclass

import spmd_types as spmd
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_distribute_tensor
from torchtitan.models.common import Linear
from torchtitan.models.common.decoder_sharding import dense_param_placement


class MaskedHead(Linear):
    """Logits of minus infinity for rows that stand for no token: probability 0, and no gradient."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        used: int
        """Rows that stand for tokens; those behind them are padding."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.used = config.used

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[B, L, in_features]`` to logits ``[B, L, V]``."""
        logits = super().forward(input)
        if self.used == self.out_features:
            return logits
        return logits.masked_fill(self._padding(logits), float("-inf"))

    def _padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Bool ``[V]``, true for padding, with the rows where the logits have them."""
        padding = torch.arange(self.out_features, device=logits.device) >= self.used
        if isinstance(logits, DTensor):
            last = logits.ndim - 1
            placements = [Shard(0) if each.is_shard(last) else Replicate() for each in logits.placements]
            # Every rank has the whole mask, so none needs to hear it from another.
            return distribute_tensor(padding, logits.device_mesh, placements, src_data_rank=None)
        mesh = current_spmd_mesh()
        return padding if mesh is None else _own_rows(padding, mesh)


def _own_rows(padding: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """What torchtitan's "spmd_types" backend gives this rank of ``[V]``, cut as the rows of the weight."""
    layout = dense_param_placement(tp=spmd.S(0))
    with spmd.no_typecheck():
        own = spmd_distribute_tensor(padding, mesh, layout)
    if spmd.is_type_checking():
        spmd.assert_type(own, layout.axis_types)
    return own
