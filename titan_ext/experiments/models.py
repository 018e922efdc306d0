"""Small models as experiments train them: whole, in fp32, from a seed; and their loss."""

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtitan.models.common.decoder import Decoder

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.text import Batch
from titan_ext.models import get_model_spec
from titan_ext.models.attention import use_packed_attention

_HEAD_DIM = 32
_CLIP_NORM = 1.0


class ModelSettings(Protocol):
    """What a small model depends on: fields that an experiment's ``Settings`` have."""

    @property
    def dim(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def length(self) -> int:
        """Tokens of a sequence."""

    @property
    def device(self) -> str: ...


def small_sizes(dim: int, layers: int, length: int) -> dict[str, Any]:
    """Keys of ``[model]`` for a decoder of this width and depth: heads of 32, and Llama's ratio of feed-forward layers."""
    return {
        "dim": dim,
        "n_layers": layers,
        "n_heads": max(1, dim // _HEAD_DIM),
        "n_kv_heads": None,
        "ffn_dim": 8 * dim // 3,
        "max_seq_len": length,
    }


def initialised(config: Decoder.Config, seed: int, device: str) -> Decoder:
    """The model of a config, with parameters drawn from the seed.

    Args:
        config: the model's; its attention becomes one that trains without an accelerator.
        seed: of the parameters.
        device: where it lies in the end; it is drawn on the CPU, to the same values everywhere.
    """
    model = use_packed_attention(config).build()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.init_weights()
    return model.to(device)


def small_llama(settings: ModelSettings, seed: int) -> Decoder:
    """A Llama over bytes, initialised from the seed, on the settings' device.

    Raises:
        UserError: the sizes do not fit each other.
    """
    sizes = small_sizes(settings.dim, settings.layers, settings.length)
    config = get_model_spec("llama3", "tiny", vocab_size=VOCABULARY, **sizes).model
    return initialised(config, seed, settings.device)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats; the batch lies on the model's device."""
    module: Any = model
    logits = module(batch.inputs, batch.positions, module.get_attention_masks(batch.positions))
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())


def train_step(model: nn.Module, loss: torch.Tensor, optimizer: Optimizer, rates: LRScheduler) -> None:
    """Backward, gradients clipped at a norm of 1, a step of the optimizer and of its learning rate."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    rates.step()


def finite(value: float) -> float | None:
    """The number; None for infinity and what is no number."""
    return value if math.isfinite(value) else None
