"""What a site has trained: its checkpoint, its weights in the precision they are kept in."""

import os
from dataclasses import replace
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.models.common.decoder import Decoder

from titan_ext.checkpoint_place import checkpoint_folder
from titan_ext.config.load import Site
from titan_ext.errors import UserError
from titan_ext.inference.checkpoint import Checkpoint, Weights, find_checkpoint
from titan_ext.inference.model import load_model


def site_checkpoint(site: Site, step: int | None = None) -> Checkpoint:
    """A checkpoint of a site's own run: that of a step, or the latest finished one.

    Raises:
        UserError: there is none.
    """
    folder = checkpoint_folder(site.config.dump_folder, site.config.checkpoint.folder)
    wanted = folder if step is None else os.path.join(folder, f"step-{step}")
    try:
        return find_checkpoint(wanted, folder)
    except UserError:
        raise UserError(
            f'site "{site.name}": no finished checkpoint in {wanted}; train with checkpoint.enable = true'
        ) from None


def trained_model(site: Site, step: int | None = None, weights: Weights = "site") -> Decoder:
    """The site's model, whole on one device, in the precision of its weights rather than that of its computation.

    Args:
        site: whose it is.
        step: of the checkpoint; None: the latest.
        weights: whose they are, see ``titan_ext.inference.checkpoint.load_weights``.

    Raises:
        UserError: there is no checkpoint, or it is of another model.
        RunError: it cannot be read.
    """
    checkpoint = site_checkpoint(site, step)
    for problem in checkpoint.changes(site.config.model_spec.model):
        raise UserError(f'site "{site.name}": {problem}')
    checkpoint.check_tokenizer(site.config)
    config: Any = site.config
    training = replace(config.training, mixed_precision_param=config.training.dtype)
    kept = replace(site, config=replace(config, training=training))
    return load_model(kept, checkpoint, weights=weights)


def export_dtype(site: Site) -> torch.dtype:
    """The type of the weights in what is written for others: ``checkpoint.export_dtype``."""
    return TORCH_DTYPE_MAP[site.config.checkpoint.export_dtype]
