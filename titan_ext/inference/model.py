"""A site's model, whole on one device, with a checkpoint's weights."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools.utils import device_type, set_default_dtype

from titan_ext.config.load import Site
from titan_ext.errors import UserError
from titan_ext.inference.checkpoint import Checkpoint, Weights, load_weights
from titan_ext.models.abbie.model import Masks
from titan_ext.models.capabilities import capabilities


def load_model(site: Site, checkpoint: Checkpoint, *, weights: Weights = "site", length: int | None = None) -> Decoder:
    """The model in evaluation mode, in the type that training computes in.

    Args:
        site: the run's, or one with another recurrence: parameters do not depend on it.
        checkpoint: where the weights are.
        weights: whose they are, see ``load_weights``.
        length: longest sequence in tokens; by default that of training.

    Raises:
        UserError: the checkpoint is of another model.
        RunError: it cannot be read.
    """
    model = _build(site, site.config.training.seq_len if length is None else length)
    load_weights(model, site.config.model_spec, checkpoint, weights)
    return model.eval()


def _build(site: Site, length: int) -> Decoder:
    config: Any = site.config
    training = replace(config.training, seq_len=length, disable_cuda_graphs=True)
    config = replace(config, training=training, parallelism=ParallelismConfig())
    model_config = deepcopy(site.config.model_spec.model)
    model_config.update_from_config(config=config)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[training.mixed_precision_param]):
        model = model_config.build()
    model.to_empty(device=device_type)
    with torch.no_grad():
        model.init_weights()
    return model


def check_iterations(site: Site, flag: str, value: object, counts: list[int]) -> None:
    """Refuse numbers of iterations that the site's model cannot be run with.

    Args:
        site: whose model it is.
        flag: that asks for them.
        value: the flag's, as the user gave it.
        counts: what it comes to.

    Raises:
        UserError: the model does not iterate, or a count is below 1.
    """
    if default_iterations(site) is None:
        raise UserError(f"{flag} {value}: model {site.model.name!r} does not iterate; leave it out")
    if any(count < 1 for count in counts):
        raise UserError(f"{flag} {value}: must be at least 1")


def default_iterations(site: Site) -> int | None:
    """Iterations of the site's model at evaluation where the user names no number; None: it does not iterate."""
    return capabilities(site.config.model_spec.model).iterations


def logits_of(
    model: Decoder,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    masks: Masks = None,
    iterations: int | None = None,
) -> torch.Tensor:
    """Logits ``[B, L, V]``.

    Args:
        model: any decoder.
        tokens: int64 ``[B, L]``.
        positions: int64 ``[B, L]``, each token's place in its document.
        masks: by default, each token attends to its own document up to itself.
        iterations: of a model that iterates; None for any other.
    """
    masks = model.get_attention_masks(positions) if masks is None else masks
    chosen = {} if iterations is None else {"iterations": iterations}
    return model(tokens, positions, masks, **chosen)
