"""Attention for a machine without an accelerator, with the document mask that training needs.

FlexAttention has no backward on a CPU, and torchtitan's scaled-dot-product attention is blind to
document boundaries: packed documents would read each other.

Shapes: B batch, L sequence, N heads, H head dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module


def document_causal_mask(positions: torch.Tensor) -> torch.Tensor:
    """Which key each query may see: those of its own document up to itself.

    Args:
        positions: int64 ``[B, L]``, 0 at each token that starts a document.

    Returns:
        bool ``[B, 1, L, L]``, true where query (third dimension) sees key (fourth).
    """
    document = torch.cumsum(positions == 0, dim=1)
    same = document[:, :, None] == document[:, None, :]
    return same.tril_()[:, None]


class PackedAttention(Module):
    """Scaled-dot-product attention under an explicit document-causal mask."""

    # The trainer asks the model for masks only where this is a FlexAttention.Config.
    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: torch.Tensor,
        scale: float | None = None,
        enable_gqa: bool = False,
        **kwargs: object,
    ) -> torch.Tensor:
        """Attend within documents; see ``document_causal_mask`` for the mask. Returns ``[B, L, N, H]``."""
        out_BNLH = F.scaled_dot_product_attention(
            q_BLNH.transpose(1, 2),
            k_BLNH.transpose(1, 2),
            v_BLNH.transpose(1, 2),
            attn_mask=attention_masks,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return out_BNLH.transpose(1, 2)


class PackedDocuments(Decoder):
    """A decoder that can build the mask of ``PackedAttention``; model specs of ours derive from it."""

    def get_attention_masks(self, positions: torch.Tensor):
        """The mask of a batch, made once and used by every layer."""
        attention = self.config.first_attention
        if attention is not None and isinstance(attention.inner_attention, PackedAttention.Config):
            return document_causal_mask(positions)
        return super().get_attention_masks(positions)


def use_packed_attention(model_config: Decoder.Config) -> None:
    """Replace FlexAttention by ``PackedAttention`` in every layer, in place.

    Raises:
        ValueError: the model cannot build the mask.
    """
    if not issubclass(model_config._owner, PackedDocuments):
        raise ValueError(
            f"{model_config._owner.__name__} does not derive from titan_ext.models.attention.PackedDocuments, "
            "which a model needs to train on a machine without an accelerator"
        )
    for layer in model_config.layers:
        attention = getattr(layer, "attention", None)
        if attention is not None and isinstance(attention.inner_attention, FlexAttention.Config):
            attention.inner_attention = PackedAttention.Config()
