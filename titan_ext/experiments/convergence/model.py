"""The model of a comparison: torchtitan's decoder at a small size, and its loss."""

import torch
import torch.nn.functional as F
from torch import nn

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.convergence.settings import Settings
from titan_ext.experiments.convergence.text import Batch
from titan_ext.experiments.models import initialised
from titan_ext.models import get_model_spec

_HEAD_DIM = 32


def build_model(settings: Settings, seed: int) -> nn.Module:
    """A decoder in fp32, initialised from the seed, on the settings' device.

    Raises:
        UserError: the sizes do not fit each other.
    """
    config = get_model_spec(
        "llama3",
        "tiny",
        dim=settings.dim,
        n_layers=settings.layers,
        n_heads=max(1, settings.dim // _HEAD_DIM),
        n_kv_heads=None,
        ffn_dim=8 * settings.dim // 3,
        vocab_size=VOCABULARY,
        max_seq_len=settings.length,
    ).model
    return initialised(config, seed, settings.device)


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats; the batch lies on the model's device."""
    logits = model(batch.inputs, batch.positions, model.get_attention_masks(batch.positions))
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
