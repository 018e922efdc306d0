"""A decoder's key-value cache, with a slot for each application of a block.

An iterated block sees other values in each iteration: iteration k of a token attends to iteration k of the tokens
before it. So every pair of iteration and layer has keys and values of its own, as if the body's copies were layers.

Shapes: B batch, L new tokens, S tokens so far, N heads, H head dimension.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from titan_ext.errors import UserError
from titan_ext.models.abbie.model import PerBlock

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder


class Slot:
    """Keys and values of one block in one iteration.

    Args:
        capacity: tokens that find room.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._length = 0
        self._kept: torch.Tensor | None = None

    def append(self, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of new tokens; returns those of all tokens so far, ``[B, S, N, H]``."""
        if self._kept is None:
            batch, _, heads, width = k_BLNH.shape
            self._kept = k_BLNH.new_empty(2, batch, self._capacity, heads, width)
        end = self._length + k_BLNH.shape[1]
        assert end <= self._capacity, "the cache is full"
        self._kept[:, :, self._length : end] = torch.stack((k_BLNH, v_BLNH))
        self._length = end
        return self._kept[0, :, :end], self._kept[1, :, :end]

    def last(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the last token, each ``[B, 1, N, H]``."""
        assert self._kept is not None, "nothing has been kept yet"
        keys, values = self._kept[:, :, self._length - 1 : self._length]
        return keys, values


class KeyValueCache(PerBlock):
    """The slots of one sequence; a decoder takes it in place of its attention mask, once ``use_cache`` prepared it.

    Args:
        capacity: tokens of the sequence at most.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._slots: dict[tuple[int, int], Slot] = {}

    def at(self, iteration: int, layer: int) -> Slot:
        """The slot of the block ``layer`` in the body's ``iteration``."""
        return self._slots.setdefault((iteration, layer), Slot(self._capacity))

    def repeat_last(self, iteration: int, until: int, layers: range) -> None:
        """Let the last token count, in the iterations after ``iteration`` and below ``until``, as it was in that one.

        Args:
            iteration: the last that the token went through, from 0.
            until: number of iterations that later tokens may go through.
            layers: the body's.
        """
        for layer in layers:
            keys, values = self.at(iteration, layer).last()
            for later in range(iteration + 1, until):
                self.at(later, layer).append(keys, values)


class CachedAttention(nn.Module):
    """A block's attention that attends through a slot where it is given one in place of a mask.

    Args:
        inner: the attention for all other masks.
        layer: index of the block.
    """

    def __init__(self, inner: nn.Module, layer: int) -> None:
        super().__init__()
        self.inner = inner
        self.layer = layer

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: object,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attend to all tokens of the slot, the new ones included; returns ``[B, L, N, H]``."""
        # A model that does not iterate hands its blocks the whole cache.
        slot = attention_masks.at(0, self.layer) if isinstance(attention_masks, PerBlock) else attention_masks
        if not isinstance(slot, Slot):
            return self.inner(
                q_BLNH, k_BLNH, v_BLNH, attention_masks=attention_masks, scale=scale, enable_gqa=enable_gqa
            )
        k_BSNH, v_BSNH = slot.append(k_BLNH, v_BLNH)
        out_BNLH = F.scaled_dot_product_attention(
            q_BLNH.transpose(1, 2),
            k_BSNH.transpose(1, 2),
            v_BSNH.transpose(1, 2),
            attn_mask=_sees(q_BLNH.shape[1], k_BSNH.shape[1], q_BLNH.device),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return out_BNLH.transpose(1, 2)


def use_cache(model: "Decoder") -> None:
    """Let every block attend through a ``KeyValueCache`` where it is given one, in place; repeating it is harmless.

    Raises:
        UserError: a block keeps no keys and values.
    """
    for name, block in model.layers.items():
        attention = getattr(block, "attention", None)
        if getattr(attention, "inner_attention", None) is None:
            raise UserError(f"{type(model).__name__}: block {name} has no attention whose keys could be cached")
        if not isinstance(attention.inner_attention, CachedAttention):
            attention.inner_attention = CachedAttention(attention.inner_attention, int(name))


def _sees(new: int, total: int, device: torch.device) -> torch.Tensor | None:
    """bool ``[L, S]``: which of all tokens each new one, the last of them, may see; None: all."""
    return None if new == 1 else torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
