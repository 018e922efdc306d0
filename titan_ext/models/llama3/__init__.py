"""The Llama 3 spec, from torchtitan's parts, with sizes that can be overridden."""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from torch import nn
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import depth_scaled_std, skip_param_init
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import UserError
from titan_ext.models import unknown
from titan_ext.models.llama3.model import Llama3Model


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a Llama 3 model; each is a key of ``[model]``."""

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Transformer blocks."""
    n_heads: int
    """Query heads; the head dimension is ``dim / n_heads``."""
    n_kv_heads: int | None = None
    """Key and value heads; None: as many as query heads."""
    ffn_dim: int
    """Hidden width of the feed-forward layer."""
    vocab_size: int = 128256
    """Rows of the embedding and of the head."""
    max_seq_len: int = 131072
    """Longest sequence that the rotary embedding allows."""
    rope_theta: float = 500000.0
    """Base of the rotary embedding."""
    enable_weight_tying: bool = False
    """One matrix for embedding and head (not under pipeline parallelism)."""


flavors: dict[str, Sizes] = {
    "tiny": Sizes(dim=96, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=256, vocab_size=512),
    "debugmodel": Sizes(dim=256, n_layers=6, n_heads=16, ffn_dim=768, vocab_size=2048),
    "125M": Sizes(dim=768, n_layers=12, n_heads=12, ffn_dim=2048, vocab_size=50432),
    "1B": Sizes(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, enable_weight_tying=True),
    "3B": Sizes(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, enable_weight_tying=True),
    "8B": Sizes(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336),
    "70B": Sizes(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672),
    "405B": Sizes(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248),
}


def model_registry(flavor: str, *, attn_backend: str = "flex", **overrides: Any) -> ModelSpec:
    """torchtitan's spec of a flavor.

    Args:
        flavor: a key of ``flavors``.
        attn_backend: torchtitan's name of the attention: "flex", "flex_flash" or "varlen".
        **overrides: fields of ``Sizes``.

    Raises:
        UserError: no such flavor, field or size.
    """
    if flavor not in flavors:
        raise unknown("model.flavor", flavor, flavors)
    known = [field.name for field in fields(Sizes)]
    for key in overrides:
        if key not in known:
            raise unknown("model", key, [*known, "attn_backend"])
    sizes = replace(flavors[flavor], **overrides)
    _check(sizes)
    return ModelSpec(
        name="llama3",
        flavor=flavor,
        model=_model_config(sizes, attn_backend),
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama3StateDictAdapter,
    )


def _check(sizes: Sizes) -> None:
    for key, value in asdict(sizes).items():
        if value is not None and not value > 0 and key != "enable_weight_tying":
            raise UserError(f"model.{key} = {value!r}: must be above 0")
    if sizes.dim % sizes.n_heads or (sizes.dim // sizes.n_heads) % 2:
        raise UserError(
            f"model.n_heads = {sizes.n_heads}: must divide model.dim ({sizes.dim}) into heads of even size"
        )
    if sizes.n_heads % (sizes.n_kv_heads or sizes.n_heads):
        raise UserError(f"model.n_kv_heads = {sizes.n_kv_heads}: must divide model.n_heads ({sizes.n_heads})")


# The initialisation is torchtitan's: normal embeddings, truncated normal matrices whose deviation
# falls with depth where a block writes to the residual stream.
def _truncated_normal(std: float, cut: float | None = None) -> dict[str, Any]:
    bounds = {} if cut is None else {"a": -cut * std, "b": cut * std}
    return {"weight": partial(nn.init.trunc_normal_, std=std, **bounds), "bias": nn.init.zeros_}


def _norm(dim: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=dim, param_init={"weight": nn.init.ones_})


def _model_config(sizes: Sizes, attn_backend: str) -> Llama3Model.Config:
    embedding_init = skip_param_init if sizes.enable_weight_tying else partial(nn.init.normal_, std=1.0)
    return Llama3Model.Config(
        dim=sizes.dim,
        vocab_size=sizes.vocab_size,
        enable_weight_tying=sizes.enable_weight_tying,
        tok_embeddings=Embedding.Config(
            num_embeddings=sizes.vocab_size, embedding_dim=sizes.dim, param_init={"weight": embedding_init}
        ),
        norm=_norm(sizes.dim),
        lm_head=Linear.Config(
            in_features=sizes.dim,
            out_features=sizes.vocab_size,
            param_init=_truncated_normal(sizes.dim**-0.5, cut=3),
        ),
        layers=[_block_config(sizes, layer, attn_backend) for layer in range(sizes.n_layers)],
    )


def _block_config(sizes: Sizes, layer: int, attn_backend: str) -> Llama3TransformerBlock.Config:
    writes_to_stream = _truncated_normal(depth_scaled_std(0.02, layer))
    rope = ComplexRoPE.Config(
        dim=sizes.dim // sizes.n_heads, max_seq_len=sizes.max_seq_len, theta=sizes.rope_theta, scaling="llama"
    )
    return Llama3TransformerBlock.Config(
        attention_norm=_norm(sizes.dim),
        ffn_norm=_norm(sizes.dim),
        attention=make_gqa_config(
            dim=sizes.dim,
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads,
            wqkv_param_init=_truncated_normal(0.02),
            wo_param_init=writes_to_stream,
            inner_attention=get_attention_config(attn_backend),
            fuse_qkv=True,
            rope=rope,
        ),
        feed_forward=make_ffn_config(
            dim=sizes.dim,
            hidden_dim=sizes.ffn_dim,
            w1_param_init=_truncated_normal(0.02),
            w2w3_param_init=writes_to_stream,
        ),
    )
