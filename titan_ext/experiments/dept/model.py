"""The model of a comparison, and its body."""

from collections.abc import Mapping

import torch
from torch import nn

from titan_ext.dept.tables import tables_of
from titan_ext.experiments.dept.settings import Settings
from titan_ext.experiments.models import initialised
from titan_ext.models.dept import model_registry

_HEAD_DIM = 32
_ROWS_MULTIPLE = 64


def build_model(settings: Settings, tokens: int, seed: int) -> nn.Module:
    """A decoder in fp32 for a vocabulary of ``tokens``, initialised from the seed, on the settings' device.

    Embedding and head are one table, of rows up to a multiple of 64; those behind the vocabulary are masked.

    Raises:
        UserError: the sizes do not fit each other.
    """
    config = model_registry(
        "tiny",
        dim=settings.dim,
        n_layers=settings.layers,
        n_heads=settings.dim // _HEAD_DIM,
        n_kv_heads=None,
        ffn_dim=8 * settings.dim // 3,
        vocab_size=-(-tokens // _ROWS_MULTIPLE) * _ROWS_MULTIPLE,
        used_vocab_size=tokens,
        max_seq_len=settings.length,
    ).model
    return initialised(config, seed, settings.device)


def body_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters besides embedding and head, by name; not copied."""
    tables = tables_of(model)
    return {name: each.detach() for name, each in model.named_parameters() if name not in tables}


def table_of(model: nn.Module) -> torch.Tensor:
    """The table that is embedding and head, ``[rows, dim]``; not copied."""
    (table,) = tables_of(model).values()
    return table.detach()


def adopt_body(model: nn.Module, body: Mapping[str, torch.Tensor]) -> None:
    """Overwrite a model's body."""
    for name, parameter in body_of(model).items():
        parameter.copy_(body[name])
