"""Whether a checkpoint holds a model's tensors: all of them, no others, each of its size."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from titan_ext.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torchtitan.protocols.model import BaseModel
    from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

# What may stand in a checkpoint beside the weights: the trainer's other states, and in Hugging Face's files a buffer
# and a tied head.
_BESIDE = re.compile(
    r"^(optimizer|lr_scheduler|dataloader|train_state|semi_sync|loss|regularizer|spikes)\b|\.inv_freq$|^lm_head\.weight$"
)
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_HEADS = "n_heads or head_dim"
_KV_HEADS = "n_kv_heads or head_dim"
# The key of [model] that decides each axis of a weight, by the module's own and by Hugging Face's name.
_AXES = {
    "tok_embeddings": ("vocab_size", "dim"),
    "embed_tokens": ("vocab_size", "dim"),
    "lm_head": ("vocab_size", "dim"),
    "wq": (_HEADS, "dim"),
    "q_proj": (_HEADS, "dim"),
    "wk": (_KV_HEADS, "dim"),
    "k_proj": (_KV_HEADS, "dim"),
    "wv": (_KV_HEADS, "dim"),
    "v_proj": (_KV_HEADS, "dim"),
    "wo": ("dim", _HEADS),
    "o_proj": ("dim", _HEADS),
    "w1": ("ffn_dim", "dim"),
    "gate_proj": ("ffn_dim", "dim"),
    "w2": ("dim", "ffn_dim"),
    "down_proj": ("dim", "ffn_dim"),
    "w3": ("ffn_dim", "dim"),
    "up_proj": ("ffn_dim", "dim"),
}
_OTHERWISE = "[model] and tokenizer must be those of the run"


def model_tensors(
    config: "BaseModel.Config", adapter: "type[BaseStateDictAdapter] | None" = None
) -> dict[str, torch.Size]:
    """Shape of each tensor of the whole model by name, without memory.

    Args:
        config: the model's.
        adapter: names and shapes as this gives them to Hugging Face's files; None: the model's own.
    """
    with torch.device("meta"):
        state: dict[str, Any] = config.build().state_dict()
    if adapter is not None:
        state = adapter(config, None).to_hf(state)
    return {name: tensor.shape for name, tensor in state.items()}


def check_tensors(
    wanted: Mapping[str, torch.Size],
    found: Mapping[str, torch.Size],
    place: str,
    *,
    files: Mapping[str, str] = MappingProxyType({}),
    cure: str | None = None,
) -> None:
    """Refuse a checkpoint that holds other tensors than the model.

    Args:
        wanted: shape of each tensor of the model.
        found: shape of each tensor of the checkpoint.
        place: what the checkpoint is, for the wording of errors.
        files: name of the file of each tensor, where there are several.
        cure: what to do about it; None: which key of ``[model]`` to set.

    Raises:
        UserError: naming the first tensor that is missing, of another size, or beyond the model.
    """
    for name, ours in wanted.items():
        if name not in found:
            raise UserError(f"{place}: has no {name}, which the model has; {cure or _cure(name, wanted, found)}")
        if found[name] != ours:
            sizes = f"{list(found[name])}, in the model {list(ours)}"
            raise UserError(f"{place}: {name} is {sizes}; {cure or _size_cure(name, ours, found[name])}")
    for name in found:
        if name not in wanted and not _BESIDE.search(name):
            file = f" (in {files[name]})" if name in files else ""
            raise UserError(f"{place}: has {name}, which the model has not{file}; {cure or _cure(name, wanted, found)}")


def stored_shapes(metadata: "Metadata") -> dict[str, torch.Size]:
    """Shape of each tensor of torch's distributed checkpoint, from its metadata."""
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}


def _size_cure(name: str, ours: torch.Size, theirs: torch.Size) -> str:
    module = name.removesuffix(".weight").rpartition(".")[2]
    keys = ("dim",) if module.endswith("norm") else _AXES.get(module, ())
    if not len(keys) == len(ours) == len(theirs):
        return _OTHERWISE
    key, size = next((key, size) for key, size, own in zip(keys, theirs, ours, strict=True) if size != own)
    return f"model.{key} must fit" if " " in key else f"model.{key} must be {size}"


def _cure(name: str, wanted: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    theirs = _layers(found)
    if _LAYER.search(name) and theirs != _layers(wanted):
        return f"model.n_layers must be {theirs}"
    if name == "lm_head.weight":
        return "model.enable_weight_tying must be true if its head is its embedding"
    return "the models here have no biases" if name.endswith(".bias") else _OTHERWISE


def _layers(names: Mapping[str, torch.Size]) -> int:
    return len({match[1] for name in names if (match := _LAYER.search(name))})
