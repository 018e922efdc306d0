"""A model's folder in Hugging Face's Llama layout: safetensors, ``config.json`` and the tokenizer."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.error_text import first_failure, reason, unwritable
from titan_ext.errors import RunError, UserError
from titan_ext.export.llama import check_layout, llama_config
from titan_ext.export.tokenizer_files import write_tokenizer
from titan_ext.huggingface.description import write_description
from titan_ext.models.dept.head import MaskedHead

_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def prepare_folder(folder: Path) -> None:
    """Make the folder, before the work that fills it.

    Raises:
        UserError: it holds something, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from error
    if held:
        raise UserError(f"--out {folder}: is not empty; name a new folder")


def write_folder(
    folder: Path,
    model: Decoder,
    spec: ModelSpec,
    *,
    tokenizer: BaseTokenizer,
    assets: str,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Write everything that transformers' ``from_pretrained``, and a run of ours, read.

    Rows of the tables that the head masks are no part of what the model computes, and are left out; other
    padding is kept.

    Args:
        folder: empty.
        model: whole on one device.
        spec: its names and sizes, whatever the run's sequence length.
        tokenizer: the model's.
        assets: folder of the tokenizer's files; empty for "byte".
        dtype: of the weights in the folder.

    Returns:
        rows of the tables in the folder.

    Raises:
        UserError: the model does not fit the layout, or the folder may not be written.
        RunError: the folder cannot be written; it is left empty.
    """
    check_layout(spec)
    rows = rows_in_use(spec.model)
    config = llama_config(spec.model, rows, tokenizer, dtype)
    theirs = spec.state_dict_adapter(spec.model, None).to_hf(ModelWrapper(model).state_dict())
    for name in _TABLES:
        if name in theirs:
            theirs[name] = theirs[name][:rows]
    state = {name: tensor.detach().to(dtype, copy=True).contiguous() for name, tensor in theirs.items()}
    try:
        _write_weights(folder, state)
        write_tokenizer(folder, assets)
        write_description(folder, config)
    except (CheckpointException, OSError) as error:
        _empty(folder)
        cause, free = first_failure(error), shutil.disk_usage(folder).free >> 20
        if isinstance(cause, OSError):
            raise unwritable(f"--out {folder}", cause) from error
        # safetensors hides the disk's complaint behind its own.
        raise RunError(f"--out {folder}: cannot be written ({free} MiB free): {reason(cause)}") from error
    return rows


def rows_in_use(config: Decoder.Config) -> int:
    """Rows of the model's tables that its softmax runs over."""
    return config.lm_head.used if isinstance(config.lm_head, MaskedHead.Config) else config.vocab_size


def _empty(folder: Path) -> None:
    """Half a model must not be taken for a whole one."""
    for path in folder.iterdir():
        path.unlink()


def _write_weights(folder: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)
