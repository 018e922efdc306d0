"""Attention for a machine without an accelerator, with the document mask that training needs.

FlexAttention has no backward on a CPU, torchtitan's variable-length attention no kernel there, and its
scaled-dot-product attention is blind to document boundaries: packed documents would read each other.

Shapes: B batch, L sequence, N heads, H head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import and_masks, create_mask
from torchtitan.models.common.attention import BaseAttention, FlexAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.gpt_oss.model import GptOssModel
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
    """Scaled-dot-product attention under an explicit mask."""

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
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Attend where the mask is true.

        Args:
            attention_masks: bool ``[B, 1, L, L]``, see ``document_causal_mask``.
            out_transform: of the output and, ``[B, L, N]``, the logarithm of the softmax's denominator.

        Returns:
            ``[B, L, N, H]``.
        """
        q_BNLH, k_BNLH, v_BNLH = (each.transpose(1, 2) for each in (q_BLNH, k_BLNH, v_BLNH))
        out_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
        )
        if out_transform is None:
            return out_BNLH.transpose(1, 2)
        # torch's kernel gives the denominator too, but no gradient through it.
        keys = k_BNLH.repeat_interleave(q_BNLH.shape[1] // k_BNLH.shape[1], dim=1)
        scores = (q_BNLH @ keys.transpose(-2, -1)).float() * (q_BNLH.shape[-1] ** -0.5 if scale is None else scale)
        lse_BNL = scores.masked_fill(~attention_masks, float("-inf")).logsumexp(-1)
        return out_transform(out_BNLH.transpose(1, 2), lse_BNL.transpose(1, 2))


class PackedDocuments(Decoder):
    """A decoder that can build the masks of ``PackedAttention``."""

    def get_attention_masks(self, positions: torch.Tensor) -> Any:
        """The mask of a batch, made once and used by every layer; several by name where the model has several."""
        attention = self.config.first_attention
        if attention is not None and isinstance(attention.inner_attention, PackedAttention.Config):
            # torchtitan's masks know no row that begins in the middle of a document.
            positions = positions.clone()
            positions[:, 0] = 0
            if _masks_of(type(self)) is Decoder.get_attention_masks:
                return document_causal_mask(positions)
        return super().get_attention_masks(positions)

    def _create_flex_attention_mask(
        self, positions: torch.Tensor, attn_config: BaseAttention.Config, mask_mods: Sequence[Callable]
    ) -> Any:
        """What torchtitan's models make each of their masks with."""
        if not isinstance(attn_config.inner_attention, PackedAttention.Config):
            return super()._create_flex_attention_mask(positions, attn_config, mask_mods)
        rows, length = positions.shape
        return create_mask(and_masks(*mask_mods), rows, 1, length, length, positions.device)


def use_packed_attention(model_config: Decoder.Config) -> Decoder.Config:
    """The config with ``PackedAttention`` in the place of other attention; its layers are changed in place.

    Raises:
        ValueError: the model attends in a way that only an accelerator can.
    """
    _check_attention(model_config)
    for layer in model_config.layers:
        if getattr(layer, "attention", None) is not None:
            layer.attention.inner_attention = PackedAttention.Config()
    for layer in getattr(model_config, "mtp_layers", ()):
        layer.attention.inner_attention = PackedAttention.Config()
    if issubclass(model_config._owner, PackedDocuments):
        return model_config
    values = {each.name: getattr(model_config, each.name) for each in fields(model_config) if each.init}
    kind: Any = type(model_config)
    return _packing(kind).Config(**values)


def _check_attention(model_config: Any) -> None:
    owner = model_config._owner
    if not isinstance(model_config, Decoder.Config):
        raise ValueError(f"{owner.__name__} is no decoder of text")
    if getattr(model_config, "vision_encoder", None) is not None:
        raise ValueError(f"{owner.__name__} has a vision encoder")
    if _masks_of(owner) not in (Decoder.get_attention_masks, GptOssModel.get_attention_masks):
        raise ValueError(f"{owner.__name__} makes attention masks of its own")
    kinds = (FlexAttention.Config, VarlenAttention.Config)
    for layer in model_config.layers:
        attention = getattr(layer, "attention", None)
        if attention is None or not isinstance(attention.inner_attention, kinds):
            raise ValueError(f"{owner.__name__} has layers of another kind than masked attention")


def _masks_of(owner: type) -> Callable:
    """The function that makes a model's masks, beside ours."""
    return next(
        vars(each)["get_attention_masks"]
        for each in owner.__mro__
        if each is not PackedDocuments and "get_attention_masks" in vars(each)
    )


@cache
def _packing(config: type[Decoder.Config]) -> type[Decoder]:
    """A model class that can build the masks of ``PackedAttention``, and is otherwise the config's own."""

    @dataclass(kw_only=True, slots=True)
    class Config(config):
        pass

    owner: type = config._owner
    return type(owner.__name__, (PackedDocuments, owner), {"Config": Config, "__module__": owner.__module__})
