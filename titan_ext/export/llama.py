"""The ``config.json`` with which transformers' LlamaForCausalLM computes what torchtitan's Llama 3 does."""

from typing import Any

import torch
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import UserError
from titan_ext.models.capabilities import capabilities
from titan_ext.models.llama3.huggingface import sizes_of, to_huggingface


def has_layout(spec: ModelSpec) -> bool:
    """Whether Hugging Face's Llama has a place for each weight of a model."""
    adapter = spec.state_dict_adapter
    return isinstance(adapter, type) and issubclass(adapter, Llama3StateDictAdapter)


def is_llama(spec: ModelSpec) -> bool:
    """Whether Hugging Face's Llama computes from the weights what the model does: not where a body is iterated."""
    return has_layout(spec) and capabilities(spec.model).runs_once


def check_layout(spec: ModelSpec) -> None:
    """Refuse a model that Hugging Face's Llama has no place for.

    Raises:
        UserError: torchtitan's Llama adapter does not fit it.
    """
    if not has_layout(spec):
        raise UserError(f"model: {spec.name} {spec.flavor} has no place in Hugging Face's Llama layout")


def llama_config(
    config: Decoder.Config, vocabulary: int, tokenizer: BaseTokenizer, dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of transformers' ``LlamaConfig``.

    Args:
        config: the model's, before a run has shortened its positions.
        vocabulary: rows of the tables in the folder.
        tokenizer: whose marks begin and end a text.
        dtype: of the weights in the folder.

    Raises:
        UserError: rotary embeddings that a Llama has not.
    """
    return {
        **to_huggingface(sizes_of(config) | {"vocab_size": vocabulary}),
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": getattr(tokenizer, "pad_id", None),
        "dtype": str(dtype).removeprefix("torch."),
    }
