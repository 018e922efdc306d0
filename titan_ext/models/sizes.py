"""Other sizes for a flavor of torchtitan's own models, whose builders take none.

A model's config is a tree of torchtitan's parts; a size is written wherever the parts hold it. Parameters are still
drawn as the flavor draws them: a deviation that torchtitan takes from the flavor's width or depth stays.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torchtitan.models.common.attention import FusedQKVLinear
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.embedding import Embedding

from titan_ext.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a decoder that differ from its flavor's; each is a key of ``[model]``, and None leaves the flavor's."""

    dim: int | None = None
    """Width of the residual stream."""
    n_layers: int | None = None
    """Transformer blocks: the flavor's first ones, and beyond its own each as the one two before it."""
    n_heads: int | None = None
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads."""
    head_dim: int | None = None
    """Width of a head."""
    ffn_dim: int | None = None
    """Hidden width of the feed-forward layers that are not experts."""
    num_experts: int | None = None
    """Routed experts of a layer."""
    top_k: int | None = None
    """Experts that a token is routed to."""
    expert_dim: int | None = None
    """Hidden width of a routed expert; shared experts keep their ratio to it."""
    load_balance_coeff: float | None = None
    """Step of the routers' expert bias (arXiv 2408.15664); 0: experts are not balanced."""
    vocab_size: int | None = None
    """Rows of the embedding and of the head."""
    max_seq_len: int | None = None
    """Longest sequence that the rotary embedding allows."""
    rope_theta: float | None = None
    """Base of the rotary embedding."""


def resize(config: Decoder.Config, sizes: Sizes) -> None:
    """Give a model the sizes, in place.

    Raises:
        InvalidValue: one that the model has no place for, or that does not fit the others.
    """
    for each in fields(sizes):
        value = getattr(sizes, each.name)
        if value is not None and (value < 0 or (value == 0 and each.name != "load_balance_coeff")):
            raise InvalidValue(f"model.{each.name}", value, "must be above 0")
    if sizes.n_layers is not None:
        _resize_depth(config, sizes.n_layers)
    if not isinstance(config, Decoder.Config):
        return  # it is offered none
    # A model may wrap its table.
    tables = [table for _, table, _, _ in config.tok_embeddings.traverse(Embedding.Config)]
    if sizes.vocab_size is not None:
        config.vocab_size = config.lm_head.out_features = sizes.vocab_size
        for table in tables:
            table.num_embeddings = sizes.vocab_size
    if sizes.dim is not None:
        config.dim = config.lm_head.in_features = sizes.dim
        for table in tables:
            table.embedding_dim = sizes.dim
        _resize_norms(config, sizes.dim, ("norm",))
    _apply(config, ("n_heads", "n_kv_heads", "head_dim", "dim", "max_seq_len", "rope_theta"), sizes, _resize_attention)
    _apply(config, ("ffn_dim", "dim"), sizes, _resize_feed_forward)
    _apply(config, ("num_experts", "top_k", "expert_dim", "load_balance_coeff", "dim"), sizes, _resize_experts)
    for layer in config.layers if sizes.dim is not None else ():
        _resize_norms(layer, sizes.dim, ("attention_norm", "ffn_norm"))


def _apply(config: Any, keys: tuple[str, ...], sizes: Sizes, change: Callable[[Any, Sizes], bool]) -> None:
    """Change every layer by the sizes of these keys; ``dim`` alone need not concern any."""
    given = [key for key in keys if getattr(sizes, key) is not None]
    changed = [change(layer, sizes) for layer in config.layers] if given else []
    own = [key for key in given if key != "dim"]
    if own and not any(changed):
        raise InvalidValue(f"model.{own[0]}", getattr(sizes, own[0]), "the flavor has no part of that size")


def _resize_depth(config: Any, count: int) -> None:
    layers = config.layers[:count]
    while len(layers) < count:
        layers.append(deepcopy(layers[max(0, len(layers) - 2)]))
    config.layers = layers


def _resize_norms(owner: Any, width: int, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(owner, name, replace(getattr(owner, name), normalized_shape=width))


def _resize_attention(layer: Any, sizes: Sizes) -> bool:
    attention = getattr(layer, "attention", None)
    if attention is None:
        return False
    if sizes.dim is not None:
        attention.dim = attention.wo.out_features = sizes.dim
    if hasattr(attention, "qkv_linear"):
        _resize_heads(attention, sizes)
    else:
        _resize_latent_heads(attention, sizes)
    kept = {"max_seq_len": sizes.max_seq_len, "theta": sizes.rope_theta}
    attention.rope = replace(attention.rope, **{key: value for key, value in kept.items() if value is not None})
    return True


def _resize_heads(attention: Any, sizes: Sizes) -> None:
    """Heads of grouped-query attention."""
    heads = sizes.n_heads or attention.n_heads
    groups = sizes.n_kv_heads or attention.n_kv_heads or heads
    width = sizes.head_dim or attention.head_dim or attention.dim // heads
    if heads % groups:
        key = "n_kv_heads" if sizes.n_kv_heads is not None else "n_heads"
        raise InvalidValue(f"model.{key}", getattr(sizes, key), f"{groups} key-value heads must divide {heads} heads")
    if width % 2:
        raise InvalidValue("model.head_dim", width, "must be even")
    qkv = attention.qkv_linear
    attention.n_heads, attention.n_kv_heads, attention.head_dim, qkv.head_dim = heads, groups, width, width
    attention.rope = replace(attention.rope, dim=width)
    if getattr(attention, "qk_norm", None) is not None:
        _resize_norms(attention, width, ("qk_norm",))
    attention.wo.in_features = heads * width
    if isinstance(qkv, FusedQKVLinear.Config):
        qkv.n_heads, qkv.n_kv_heads = heads, groups
        _resize_fused(qkv.wqkv, (heads + 2 * groups) * width)
        qkv.wqkv.in_features = attention.dim
        return
    qkv.wq.out_features, qkv.wkv.out_features = heads * width, groups * width
    qkv.wq.in_features = qkv.wkv.in_features = attention.dim


def _resize_fused(linear: Any, rows: int) -> None:
    if rows != linear.out_features:
        draw = {key: _in_blocks(init, linear.out_features) for key, init in linear.param_init.items()}
        linear.param_init, linear.out_features = draw, rows


def _in_blocks(init: Callable[[torch.Tensor], Any], rows: int) -> Callable[[torch.Tensor], None]:
    """Draw elements that are independent of each other in blocks of the only number of rows that ``init`` knows."""

    def draw(tensor: torch.Tensor) -> None:
        # From a sharded tensor, new_empty makes whole ones: what is drawn does not depend on the layout.
        blocks = [tensor.new_empty(rows, *tensor.shape[1:]) for _ in range(-(-tensor.shape[0] // rows))]
        for block in blocks:
            init(block)
        with torch.no_grad():
            tensor.copy_(torch.cat(blocks)[: tensor.shape[0]])

    return draw


def _resize_latent_heads(attention: Any, sizes: Sizes) -> None:
    """Heads of multi-head latent attention, whose widths and ranks are the flavor's."""
    for key in ("n_kv_heads", "head_dim"):
        if getattr(sizes, key) is not None:
            raise InvalidValue(f"model.{key}", getattr(sizes, key), "latent attention has no such size; leave it out")
    if sizes.dim is not None:
        for linear in (attention.wq, attention.wq_a, attention.wkv_a):
            if linear is not None:
                linear.in_features = sizes.dim
    if sizes.n_heads is not None:
        queries = attention.wq if attention.wq is not None else attention.wq_b
        queries.out_features = queries.out_features // attention.n_heads * sizes.n_heads
        attention.wkv_b.out_features = attention.wkv_b.out_features // attention.n_heads * sizes.n_heads
        attention.wo.in_features = attention.wo.in_features // attention.n_heads * sizes.n_heads
        attention.n_heads = sizes.n_heads


def _resize_feed_forward(layer: Any, sizes: Sizes) -> bool:
    feed_forward = getattr(layer, "feed_forward", None)
    if feed_forward is None:
        return False
    _resize_swiglu(feed_forward, sizes.dim, sizes.ffn_dim)
    return True


def _resize_swiglu(feed_forward: Any, dim: int | None, hidden: int | None) -> None:
    inner, outer = (feed_forward.w1, feed_forward.w3), feed_forward.w2
    if dim is not None:
        outer.out_features = dim
        for linear in inner:
            linear.in_features = dim
    if hidden is not None:
        outer.in_features = hidden
        for linear in inner:
            linear.out_features = hidden


def _resize_experts(layer: Any, sizes: Sizes) -> bool:
    moe = getattr(layer, "moe", None)
    if moe is None:
        return False
    experts, router, dispatcher = moe.routed_experts.inner_experts, moe.router, moe.routed_experts.token_dispatcher
    if sizes.dim is not None:
        experts.dim = router.gate.in_features = sizes.dim
        if getattr(dispatcher, "hidden_dim", None) is not None:
            dispatcher.hidden_dim = sizes.dim
    if sizes.num_experts is not None:
        for part in (moe, experts, router, dispatcher):
            part.num_experts = sizes.num_experts
        router.gate.out_features = sizes.num_experts
    if sizes.top_k is not None:
        router.top_k = dispatcher.top_k = sizes.top_k
    _check_choice(router, sizes)
    if moe.shared_experts is not None:
        ratio = moe.shared_experts.w1.out_features / experts.hidden_dim
        _resize_swiglu(moe.shared_experts, sizes.dim, round(ratio * (sizes.expert_dim or experts.hidden_dim)))
    experts.hidden_dim = sizes.expert_dim or experts.hidden_dim
    if sizes.load_balance_coeff is not None:
        moe.load_balance_coeff = sizes.load_balance_coeff or None
    return True


def _check_choice(router: Any, sizes: Sizes) -> None:
    key = "top_k" if sizes.top_k is not None else "num_experts"
    if router.top_k > router.num_experts:
        problem = f"a token cannot go to {router.top_k} of {router.num_experts} experts"
        raise InvalidValue(f"model.{key}", getattr(sizes, key), problem)
    groups = router.num_expert_groups
    if groups is not None and (router.num_experts % groups or router.num_experts < 2 * groups):
        problem = f"must be a multiple of the router's {groups} groups, of two experts at least"
        raise InvalidValue("model.num_experts", router.num_experts, problem)


def sizes_in(config: Any) -> dict[str, Any]:
    """The sizes that a decoder of torchtitan's has; those that a layer has not are those of the first that has them."""
    if not isinstance(config, Decoder.Config):
        return {}
    found: dict[str, Any] = {"dim": config.dim, "n_layers": len(config.layers), "vocab_size": config.vocab_size}
    found["enable_weight_tying"] = config.enable_weight_tying
    attention = config.first_attention
    if attention is not None:
        found |= {
            key: getattr(attention, key) for key in ("n_heads", "n_kv_heads", "head_dim") if hasattr(attention, key)
        }
        if getattr(attention, "rope", None) is not None:
            found |= {"max_seq_len": attention.rope.max_seq_len, "rope_theta": attention.rope.theta}
    dense = [layer.feed_forward for layer in config.layers if getattr(layer, "feed_forward", None) is not None]
    sparse = [layer.moe for layer in config.layers if getattr(layer, "moe", None) is not None]
    if dense:
        found["ffn_dim"] = dense[0].w1.out_features
    if sparse:
        found |= {"num_experts": sparse[0].num_experts, "top_k": sparse[0].router.top_k}
        found["expert_dim"] = sparse[0].routed_experts.inner_experts.hidden_dim
        found["load_balance_coeff"] = sparse[0].load_balance_coeff or 0.0
    return found
