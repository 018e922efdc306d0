"""DEPT: decoders whose token embeddings are a site's own or shared by row (arXiv 2410.05021)."""

from dataclasses import asdict, fields, replace
from typing import Any

from torchtitan.models.common import Linear
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import InvalidValue
from titan_ext.models import llama3, unknown
from titan_ext.models.dept.head import MaskedHead
from titan_ext.models.llama3 import from_huggingface as from_huggingface


def _tied(sizes: llama3.Sizes) -> llama3.Sizes:
    return replace(sizes, enable_weight_tying=True)


# Depth, width and heads are the paper's. Its feed-forward layer has two matrices of width 4 dim; ours has three, and
# about as many parameters at 8/3 dim. Rows are those of its English tokenizer, 50,257, up to a multiple of 64.
_ENGLISH = 50304
flavors: dict[str, llama3.Sizes] = {
    "tiny": _tied(llama3.flavors["tiny"]),
    "debugmodel": _tied(llama3.flavors["debugmodel"]),
    "125M": _tied(replace(llama3.flavors["125M"], vocab_size=_ENGLISH)),
    "350M": _tied(llama3.Sizes(dim=1024, n_layers=24, n_heads=16, ffn_dim=2752, vocab_size=_ENGLISH)),
    "1.3B": _tied(llama3.Sizes(dim=2048, n_layers=24, n_heads=16, ffn_dim=5440, vocab_size=_ENGLISH)),
}


def model_registry(
    flavor: str, *, attn_backend: str = "flex", used_vocab_size: int | None = None, **overrides: Any
) -> ModelSpec:
    """torchtitan's spec of a flavor: a Llama 3, its head tied to its embedding.

    Args:
        flavor: a key of ``flavors``.
        attn_backend: torchtitan's name of the attention: "flex", "flex_flash" or "varlen".
        used_vocab_size: rows of the vocabulary that stand for tokens; None: all.
        **overrides: fields of ``llama3.Sizes``.

    Raises:
        UserError: no such flavor, field or size.
    """
    if flavor not in flavors:
        raise unknown("model.flavor", flavor, flavors)
    sizes = asdict(flavors[flavor]) | overrides
    spec = replace(llama3.model_registry("tiny", attn_backend=attn_backend, **sizes), name="dept", flavor=flavor)
    return spec if used_vocab_size is None else decouple(spec, used_vocab_size)


def decouple(spec: ModelSpec, used: int) -> ModelSpec:
    """The same model for a vocabulary that is smaller than its table.

    Rows from ``used`` on have no part in the softmax and get no gradient from it. Names and shapes of parameters stay.

    Args:
        spec: of any decoder whose ``lm_head`` is torchtitan's ``Linear``.
        used: rows that stand for tokens.

    Raises:
        UserError: a model without such a head, or fewer or more rows than it has.
    """
    head = spec.model.lm_head if isinstance(spec.model, Decoder.Config) else None
    if type(head) not in (Linear.Config, MaskedHead.Config):
        raise InvalidValue("model.name", spec.name, "has no head of torchtitan's Linear, so its rows cannot be masked")
    if not 1 <= used <= head.out_features:
        raise InvalidValue(
            "model.used_vocab_size", used, f"must be from 1 to the rows of the head ({head.out_features})"
        )
    settings = {field.name: getattr(head, field.name) for field in fields(Linear.Config)}
    return replace(spec, model=replace(spec.model, lm_head=MaskedHead.Config(**settings, used=used)))
