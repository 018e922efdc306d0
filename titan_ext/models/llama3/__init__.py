"""The Llama 3 spec, from torchtitan's parts, with sizes that can be overridden."""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import depth_scaled_std, skip_param_init
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import InvalidValue
from titan_ext.models import unknown
from titan_ext.models.llama3.huggingface import from_huggingface as from_huggingface
from titan_ext.models.llama3.model import Llama3Model

RopeScaling = Literal["none", "llama3"]
"""How a rotary embedding reaches further than the texts that it was first trained on."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a Llama 3 model; each is a key of ``[model]``."""

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Transformer blocks."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads; None: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None: ``dim / n_heads``."""
    ffn_dim: int
    """Hidden width of the feed-forward layer."""
    vocab_size: int = 128256
    """Rows of the embedding and of the head."""
    max_seq_len: int = 131072
    """Longest sequence that the rotary embedding allows."""
    rope_theta: float = 500000.0
    """Base of the rotary embedding."""
    rope_scaling: RopeScaling = "llama3"
    """"llama3" slows low frequencies down, as Llama 3.1 and 3.2 do; "none" leaves all, as Llama 2 and 3.0 do."""
    rope_scaling_factor: float = 8.0
    """How many times as long those wavelengths become that are above ``rope_original_max_positions`` divided by
    ``rope_low_freq_factor`` (8 in Llama 3.1, 32 in 3.2)."""
    rope_low_freq_factor: float = 1.0
    """See ``rope_scaling_factor``; between the two bounds wavelengths blend."""
    rope_high_freq_factor: float = 4.0
    """Wavelengths below ``rope_original_max_positions`` divided by this stay as they are."""
    rope_original_max_positions: int = 8192
    """Tokens of the longest text before the rotary embedding was scaled."""
    norm_eps: float = 1e-5
    """What every norm adds to the mean square."""
    enable_weight_tying: bool = False
    """One matrix for embedding and head (not under pipeline parallelism)."""


_LLAMA_32: dict[str, Any] = {"enable_weight_tying": True, "rope_scaling_factor": 32.0}
flavors: dict[str, Sizes] = {
    "tiny": Sizes(dim=96, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=256, vocab_size=512),
    "debugmodel": Sizes(dim=256, n_layers=6, n_heads=16, ffn_dim=768, vocab_size=2048),
    "125M": Sizes(dim=768, n_layers=12, n_heads=12, ffn_dim=2048, vocab_size=50432),
    "1B": Sizes(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, **_LLAMA_32),
    "3B": Sizes(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, **_LLAMA_32),
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
    if sizes.rope_scaling not in get_args(RopeScaling):
        raise unknown("model.rope_scaling", sizes.rope_scaling, get_args(RopeScaling))
    for key, value in asdict(sizes).items():
        if key not in ("rope_scaling", "enable_weight_tying") and value is not None and not value > 0:
            raise InvalidValue(f"model.{key}", value, "must be above 0")
    if sizes.head_dim is None and (sizes.dim % sizes.n_heads or (sizes.dim // sizes.n_heads) % 2):
        raise InvalidValue(
            "model.n_heads", sizes.n_heads, f"must divide model.dim ({sizes.dim}) into heads of even size"
        )
    if (sizes.head_dim or 0) % 2:
        raise InvalidValue("model.head_dim", sizes.head_dim, "must be even")
    if sizes.n_heads % (sizes.n_kv_heads or sizes.n_heads):
        raise InvalidValue("model.n_kv_heads", sizes.n_kv_heads, f"must divide model.n_heads ({sizes.n_heads})")
    if not sizes.rope_high_freq_factor > sizes.rope_low_freq_factor:
        raise InvalidValue(
            "model.rope_high_freq_factor",
            sizes.rope_high_freq_factor,
            f"must be above model.rope_low_freq_factor ({sizes.rope_low_freq_factor})",
        )


# The initialisation is torchtitan's: normal embeddings, truncated normal matrices whose deviation
# falls with depth where a block writes to the residual stream.
def _truncated_normal(std: float, cut: float | None = None) -> dict[str, Any]:
    bounds: dict[str, Any] = {} if cut is None else {"a": -cut * std, "b": cut * std}
    return {"weight": partial(nn.init.trunc_normal_, std=std, **bounds), "bias": nn.init.zeros_}


def _norm(sizes: Sizes) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=sizes.dim, eps=sizes.norm_eps, param_init={"weight": nn.init.ones_})


def _rope(sizes: Sizes) -> ComplexRoPE.Config:
    return ComplexRoPE.Config(
        dim=sizes.head_dim or sizes.dim // sizes.n_heads,
        max_seq_len=sizes.max_seq_len,
        theta=sizes.rope_theta,
        scaling="llama" if sizes.rope_scaling == "llama3" else "none",
        scaling_factor=sizes.rope_scaling_factor,
        low_freq_factor=sizes.rope_low_freq_factor,
        high_freq_factor=sizes.rope_high_freq_factor,
        original_max_position_embeddings=sizes.rope_original_max_positions,
    )


def _model_config(sizes: Sizes, attn_backend: str) -> Llama3Model.Config:
    embedding_init = skip_param_init if sizes.enable_weight_tying else partial(nn.init.normal_, std=1.0)
    return Llama3Model.Config(
        dim=sizes.dim,
        vocab_size=sizes.vocab_size,
        enable_weight_tying=sizes.enable_weight_tying,
        tok_embeddings=Embedding.Config(
            num_embeddings=sizes.vocab_size, embedding_dim=sizes.dim, param_init={"weight": embedding_init}
        ),
        norm=_norm(sizes),
        lm_head=Linear.Config(
            in_features=sizes.dim,
            out_features=sizes.vocab_size,
            param_init=_truncated_normal(sizes.dim**-0.5, cut=3),
        ),
        layers=[_block_config(sizes, layer, attn_backend) for layer in range(sizes.n_layers)],
    )


def _block_config(sizes: Sizes, layer: int, attn_backend: str) -> Llama3TransformerBlock.Config:
    writes_to_stream = _truncated_normal(depth_scaled_std(0.02, layer))
    return Llama3TransformerBlock.Config(
        attention_norm=_norm(sizes),
        ffn_norm=_norm(sizes),
        attention=make_gqa_config(
            dim=sizes.dim,
            n_heads=sizes.n_heads,
            n_kv_heads=sizes.n_kv_heads,
            head_dim=sizes.head_dim,
            wqkv_param_init=_truncated_normal(0.02),
            wo_param_init=writes_to_stream,
            inner_attention=get_attention_config(attn_backend),
            fuse_qkv=True,
            rope=_rope(sizes),
        ),
        feed_forward=make_ffn_config(
            dim=sizes.dim,
            hidden_dim=sizes.ffn_dim,
            w1_param_init=_truncated_normal(0.02),
            w2w3_param_init=writes_to_stream,
        ),
    )
