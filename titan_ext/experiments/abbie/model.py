"""A variant's model, and its loss."""

import torch
import torch.nn.functional as F

from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY
from titan_ext.experiments.abbie.settings import Settings
from titan_ext.experiments.abbie.variants import VARIANTS
from titan_ext.experiments.convergence.text import Batch
from titan_ext.experiments.models import initialised
from titan_ext.models import get_model_spec
from titan_ext.models.abbie.model import AbbieModel


def build_model(settings: Settings, variant: str, seed: int, **sizes: int) -> AbbieModel:
    """A variant in fp32, initialised from the seed, on the settings' device; embedding and head are one matrix.

    Args:
        settings: those of the comparison.
        variant: a key of ``VARIANTS``.
        seed: of the parameters, and of the noise that the depth recurrence starts from.
        **sizes: keys of ``[model]`` that differ from the flavor's.

    Raises:
        UserError: the sizes do not fit each other.
    """
    common = {"vocab_size": VOCABULARY, "enable_weight_tying": True, "max_seq_len": settings.length}
    flavor = settings.flavor + VARIANTS[variant].suffix
    config = get_model_spec("abbie", flavor, **common, **VARIANTS[variant].recurrence, **sizes).model
    config.seed = seed
    return initialised(config, seed, settings.device)


def compile_blocks(model: AbbieModel) -> None:
    """Compile a model block by block, as torchtitan does."""
    for block in model.layers.values():
        block.compile(fullgraph=True)


def loss_of(model: AbbieModel, batch: Batch, iterations: int | None = None) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats; on an accelerator its matrix products are in bf16.

    Args:
        model: a variant.
        batch: on the model's device.
        iterations: of the body; None: as the model says.
    """
    device = batch.inputs.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        masks = model.get_attention_masks(batch.positions)
        logits = model(batch.inputs, batch.positions, masks, iterations=iterations)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
