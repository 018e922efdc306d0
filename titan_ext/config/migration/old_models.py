"""Models and datasets that torchtitan 0.1 and 0.2 knew by name, and what they are here."""

import re
from dataclasses import dataclass, field
from typing import Any

from titan_ext.errors import UserError

_LLAMA3 = ("debugmodel", "8B", "70B", "405B")
# Layers, width and heads; the feed-forward layer's width; key-value heads where they are fewer.
_LLAMA2 = {
    "debugmodel": (8, 256, 16, 768, None),
    "271M": (16, 1024, 8, 2816, None),
    "1B": (18, 2048, 16, 5632, None),
    "7B": (32, 4096, 32, 11008, None),
    "13B": (40, 5120, 40, 13824, None),
    "26B": (80, 5120, 40, 13824, None),
    "70B": (80, 8192, 64, 28672, 8),
}
_LLAMA3_LAYERS = {"debugmodel": 6, "8B": 32, "70B": 80, "405B": 126}
_TORCHTITANS = ("deepseek_v3", "gpt_oss", "qwen3")
_ATTENTION = re.compile(r"_(flex|varlen)(?:_attn)?$")

EARLY, FIRST, SECOND = "before 0.1", "0.1", "0.2"
"""Eras of the files: up to May 2025, up to August 2025, up to February 2026."""


@dataclass(frozen=True, slots=True)
class OldModel:
    """A model as ``[model]`` says it here."""

    keys: dict[str, Any]
    layers: int | None = None
    """Blocks; None where only the spec knows."""

    note: str = ""
    """What is not quite the same."""

    blanks: dict[str, str] = field(default_factory=dict)
    """Keys that have to be filled in, and why."""


def old_model(name: str, flavor: str, era: str) -> OldModel:
    """What ``model.name`` and ``model.flavor`` of such a file come to; a model that is not known is to be filled in."""
    attention = _ATTENTION.search(flavor)
    plain = _ATTENTION.sub("", flavor)
    backend = {"attn_backend": attention.group(1)} if attention else {}
    if name == "llama3" and plain in _LLAMA3:
        return _llama3(plain, era, backend)
    if name in ("llama", "llama2") and flavor in _LLAMA2:
        return _llama2(name, flavor)
    if name in _TORCHTITANS:
        return _torchtitans(name, plain, backend)
    if name == "llama3":
        why = f'torchtitan had no "{flavor}"; its sizes are keys of [model], or name a flavor of ours'
        return OldModel({"name": name, "flavor": ""}, blanks={"flavor": why})
    why = f'"{name}", flavor "{flavor}", has no spec here; the dotted path of one of yours'
    return OldModel({"name": "", "flavor": flavor}, blanks={"name": why})


def _torchtitans(name: str, flavor: str, backend: dict[str, str]) -> OldModel:
    """A model with the rows of its flavor, whatever the tokenizer."""
    from titan_ext.models import get_model_spec

    keys = {"name": name, "flavor": flavor} | backend
    try:
        return OldModel({**keys, "vocab_size": get_model_spec(name, flavor).model.vocab_size})
    except UserError:
        return OldModel(keys, blanks={"flavor": f'torchtitan\'s {name} has no "{flavor}" any more'})


def _llama3(flavor: str, era: str, backend: dict[str, str]) -> OldModel:
    keys: dict[str, Any] = {"name": "llama3", "flavor": flavor}
    layers = _LLAMA3_LAYERS[flavor]
    if era == EARLY and flavor == "debugmodel":
        keys["n_layers"] = layers = 8
    if era == SECOND:
        keys["vocab_size"] = 2048 if flavor == "debugmodel" else 128256
    else:
        keys["rope_scaling"] = "none"
    return OldModel(keys | backend, layers)


def _llama2(name: str, flavor: str) -> OldModel:
    layers, dim, heads, ffn_dim, kv_heads = _LLAMA2[flavor]
    sizes = {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads or heads, "ffn_dim": ffn_dim}
    rope = {"rope_theta": 10000.0, "rope_scaling": "none"}
    note = (
        f'model.name = "{name}", flavor "{flavor}": written out as sizes of the Llama 3 spec, which has the same parts'
    )
    return OldModel({"name": "llama3", "flavor": "8B"} | sizes | rope, layers, note)


_NAMED = {"c4": ":en:train", "c4_test": "::train", "c4_validation": ":en:validation"}
_ON_THE_HUB = {
    "c4": "hf:c4",
    "c4_validation": "hf:c4_validation",
    "alpaca": "hf:tatsu-lab/alpaca",
    "minipile": "hf:JeanKaddour/minipile",
    "openwebtext": "hf:Skylion007/openwebtext",
}
_IN_THE_REPOSITORY = ("c4_test", "c4_mini")


def old_dataset(name: str | None, path: str | None) -> tuple[str, str]:
    """What a dataset is called here, and why nothing is where it is left blank.

    Args:
        name: as torchtitan knew it; None: the file named none.
        path: the path that the file gave it, if any.
    """
    if name is None:
        return "", 'the file named none; a file, a folder or "hf:NAME"' + (f' ("{path}"?)' if path else "")
    if path and name.lower() in _NAMED and ":" not in path:
        return f"hf:{path}{_NAMED[name.lower()]}", ""
    if path:
        return "", f'dataset "{name}" at "{path}": name the folder, or "hf:{path}" as the datasets library reads it'
    if name.lower() in _ON_THE_HUB:
        return _ON_THE_HUB[name.lower()], ""
    if name.lower() in _IN_THE_REPOSITORY:
        return (
            "",
            f'dataset "{name}" was a file of torchtitan\'s repository: name a file or folder of yours, or "hf:c4"',
        )
    return "", f'dataset "{name}" is not known here: name a file, a folder or "hf:NAME"'
