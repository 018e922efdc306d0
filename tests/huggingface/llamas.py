"""Folders of tiny Llamas in Hugging Face's format, and what such a model computes, from its equations in float64."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 264  # the byte tokenizer's ids, rounded up
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Llama:
    """What a folder is to be."""

    dim: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn_dim: int = 96
    vocabulary: int = VOCABULARY
    eps: float = 1e-5
    theta: float = 500000.0
    scaling: dict[str, Any] | None = field(default_factory=lambda: dict(LLAMA_31))
    tied: bool = False
    dtype: torch.dtype = torch.float32
    files: int = 1
    rope_parameters: bool = False
    """Whether rotary embeddings are described as since transformers 5."""

    def config(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": self.theta, "rope_scaling": self.scaling}
        if self.rope_parameters:
            rope = {"rope_parameters": {"rope_type": "default", **(self.scaling or {}), "rope_theta": self.theta}}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.dim,
            "intermediate_size": self.ffn_dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 256,
            "rms_norm_eps": self.eps,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            **rope,
        }

    def weights(self, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * 2 / math.sqrt(shape[-1])).to(self.dtype)

        def norm() -> torch.Tensor:
            return (1 + 0.2 * torch.randn(self.dim, generator=generator)).to(self.dtype)

        found = {"model.embed_tokens.weight": matrix(self.vocabulary, self.dim), "model.norm.weight": norm()}
        for layer in range(self.layers):
            found |= {
                f"model.layers.{layer}.{name}.weight": value
                for name, value in {
                    "input_layernorm": norm(),
                    "post_attention_layernorm": norm(),
                    "self_attn.q_proj": matrix(self.heads * self.head_dim, self.dim),
                    "self_attn.k_proj": matrix(self.kv_heads * self.head_dim, self.dim),
                    "self_attn.v_proj": matrix(self.kv_heads * self.head_dim, self.dim),
                    "self_attn.o_proj": matrix(self.dim, self.heads * self.head_dim),
                    "mlp.gate_proj": matrix(self.ffn_dim, self.dim),
                    "mlp.up_proj": matrix(self.ffn_dim, self.dim),
                    "mlp.down_proj": matrix(self.dim, self.ffn_dim),
                }.items()
            }
        return found if self.tied else found | {"lm_head.weight": matrix(self.vocabulary, self.dim)}


def write_llama(folder: Path, llama: Llama = Llama(), **config: Any) -> Path:
    """The folder; ``config`` replaces fields of its ``config.json``, None taking one out."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = llama.weights()
    names = sorted(weights)
    for place in range(llama.files):
        name = "model.safetensors" if llama.files == 1 else f"model-{place + 1:05}-of-{llama.files:05}.safetensors"
        save_file({each: weights[each] for each in names[place :: llama.files]}, folder / name)
    if llama.files > 1:
        files = [f"model-{place + 1:05}-of-{llama.files:05}.safetensors" for place in range(llama.files)]
        index = {name: files[place % llama.files] for place, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    described = {name: value for name, value in (llama.config() | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def change_weights(folder: Path, change: Any, file: str = "model.safetensors") -> Path:
    """Write a file's tensors anew after ``change(tensors)``."""
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file)
    return folder


def logits(folder: Path, llama: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Float64 ``[B, L, V]`` of tokens ``[B, L]``, from the files alone and the equations of the Llama papers."""
    weights = {name: value.double() for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    embedding = weights["model.embed_tokens.weight"]
    h = embedding[tokens]
    for layer in range(llama.layers):
        own = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items()}
        h = h + _attention(_norm(h, own["input_layernorm.weight"], llama.eps), own, llama)
        x = _norm(h, own["post_attention_layernorm.weight"], llama.eps)
        gate = x @ own["mlp.gate_proj.weight"].T
        h = h + (gate * torch.sigmoid(gate) * (x @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return _norm(h, weights["model.norm.weight"], llama.eps) @ weights.get("lm_head.weight", embedding).T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _attention(x: torch.Tensor, own: dict[str, torch.Tensor], llama: Llama) -> torch.Tensor:
    length, group = x.shape[1], llama.heads // llama.kv_heads
    heads = []
    for head in range(llama.heads):
        q, k, v = (
            x @ own[f"self_attn.{name}_proj.weight"][at * llama.head_dim : (at + 1) * llama.head_dim].T
            for name, at in (("q", head), ("k", head // group), ("v", head // group))
        )
        scores = _turned(q, llama) @ _turned(k, llama).transpose(1, 2) / math.sqrt(llama.head_dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
    return torch.cat(heads, -1) @ own["self_attn.o_proj.weight"].T


def _turned(x: torch.Tensor, llama: Llama) -> torch.Tensor:
    """Dimension i and i + half of a head are a point that each position turns by the i-th frequency."""
    half = llama.head_dim // 2
    frequencies = torch.tensor([_frequency(i, llama) for i in range(half)], dtype=torch.float64)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequencies)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def _frequency(i: int, llama: Llama) -> float:
    frequency, scaling = llama.theta ** (-2 * i / llama.head_dim), llama.scaling
    if scaling is None:
        return frequency
    # Full turns within the texts of the first training: few of them are slowed down, many stay, between is a blend.
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = min(1.0, max(0.0, (turns - low) / (high - low)))
    return frequency * (keep + (1 - keep) / scaling["factor"])
