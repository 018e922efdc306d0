"""A decoder's tables of the vocabulary: its token embedding and its head, one matrix where they are tied."""

from dataclasses import replace

import torch
from torch import nn
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools.utils import set_default_dtype

from titan_ext.models.dept.head import MaskedHead

_NAMES = ("tok_embeddings.weight", "lm_head.weight")


def tables_of(model: Decoder) -> dict[str, nn.Parameter]:
    """The tables by parameter name, each ``[rows, dim]``; only the embedding where the head is tied to it."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in _NAMES if name in parameters}


def with_rows(config: Decoder.Config, rows: int) -> Decoder.Config:
    """The same model with tables of another number of rows, none of them masked."""
    unmasked = {"used": rows} if isinstance(config.lm_head, MaskedHead.Config) else {}
    return replace(
        config,
        vocab_size=rows,
        tok_embeddings=replace(config.tok_embeddings, num_embeddings=rows),
        lm_head=replace(config.lm_head, out_features=rows, **unmasked),
    )


def renew_tables(model: Decoder, rows: int, *, seed: int) -> None:
    """Give a model new tables, random as its own initialiser makes them; its body stays as it is.

    Args:
        model: whole on one device.
        rows: of the new tables.
        seed: of the random values.
    """
    config = with_rows(model.config, rows)
    weight = model.norm.weight
    with torch.random.fork_rng(), torch.device(weight.device), set_default_dtype(weight.dtype), torch.no_grad():
        torch.manual_seed(seed)
        model.tok_embeddings, model.lm_head = config.tok_embeddings.build(), config.lm_head.build()
        if config.enable_weight_tying:
            model.tok_embeddings.weight = model.lm_head.weight
        for table in (model.tok_embeddings, model.lm_head):
            table.init_states()
    model.config = config
