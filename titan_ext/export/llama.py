"""The ``config.json`` with which transformers' LlamaForCausalLM computes what torchtitan's Llama 3 does."""

from typing import Any

import torch

from titan_ext.errors import UserError
from titan_ext.trainer.cpu import prepare

prepare()

from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.decoder import Decoder  # noqa: E402
from torchtitan.models.common.rope import RoPE  # noqa: E402
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402


def check_layout(spec: ModelSpec) -> None:
    """Refuse a model that Hugging Face's Llama has no place for.

    Raises:
        UserError: torchtitan's Llama adapter does not fit it.
    """
    adapter = spec.state_dict_adapter
    if not (isinstance(adapter, type) and issubclass(adapter, Llama3StateDictAdapter)):
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
    block = config.layers[0]
    attention = block.attention
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": config.dim,
        "intermediate_size": block.feed_forward.w1.out_features,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim or config.dim // attention.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": attention.rope.theta,
        "rope_scaling": _rope_scaling(attention.rope),
        "tie_word_embeddings": config.enable_weight_tying,
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": getattr(tokenizer, "pad_id", None),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _rope_scaling(rope: RoPE.Config) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    if rope.scaling != "llama":
        raise UserError(f"model: rotary embeddings scaled by {rope.scaling!r} have no place in that layout")
    return {
        "rope_type": "llama3",
        "factor": rope.scaling_factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
