"""What ``config.json`` says of a Llama, in keys of ``[model]``, and the other way round.

Fields and the defaults of those that a file leaves out are those of transformers' ``LlamaConfig``; of its two ways to
write rotary embeddings, ``rope_theta`` with ``rope_scaling`` and ``rope_parameters``, both are read and the first,
which every version understands, is written.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from titan_ext.config.settings import show
from titan_ext.errors import UserError

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder
    from torchtitan.models.common.rope import RoPE

SHAPES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
"""Keys of ``[model]`` that a flavor's name stands for."""

FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "enable_weight_tying": "tie_word_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_type",
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_positions": "original_max_position_embeddings",
}
"""What ``config.json`` calls each key of ``[model]``."""

_ARCHITECTURE, _MODEL_TYPE = "LlamaForCausalLM", "llama"
# Values of fields that the models here have, and why another is refused.
_NO_BIAS = "the models here have no biases"
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": ((_MODEL_TYPE,), "another family computes otherwise"),
    "hidden_act": (("silu", "swish"), "the models here have no other activation"),
    "attention_bias": ((False,), _NO_BIAS),
    "mlp_bias": ((False,), _NO_BIAS),
}
# Fields with which a Llama is stored in another form, or is no plain one.
_PACKED = "quantised weights are not read; take the model that they were made from"
_ABSENT = {
    "quantization_config": _PACKED,
    "compression_config": _PACKED,
    "auto_map": "code of its own is not run; remove it if the weights are a plain Llama's",
}
_SCALED = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_positions")


def from_huggingface(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Keys of ``[model]`` with which it is the model that a ``config.json`` describes.

    Args:
        config: the file's content.
        file: its path, for the wording of errors.

    Raises:
        UserError: another architecture, a part that the model here has not, a field that is missing or says two things.
    """
    fields = _Fields(config, file)
    _check_architecture(config, fields)
    dim, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.size("head_dim", dim // heads)
    sizes: dict[str, Any] = {
        "dim": dim,
        "n_layers": fields.size("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": fields.size("num_key_value_heads", heads),
        "head_dim": None if head_dim * heads == dim else head_dim,
        "ffn_dim": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_seq_len": fields.size("max_position_embeddings", 2048),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "enable_weight_tying": fields.flag("tie_word_embeddings", False),
    }
    return sizes | _rope_from_huggingface(config, file, sizes["max_seq_len"])


def to_huggingface(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``config.json`` that say of a model what ``from_huggingface`` reads.

    Args:
        sizes: every key of ``FIELDS``.
    """
    plain = {field: sizes[key] for key, field in FIELDS.items() if key not in (*_SCALED, "rope_scaling")}
    scaling = {"rope_type": sizes["rope_scaling"]} | {FIELDS[key]: sizes[key] for key in _SCALED}
    return {
        "architectures": [_ARCHITECTURE],
        **{name: values[0] for name, (values, _) in _FIXED.items()},
        **plain,
        "num_key_value_heads": sizes["n_kv_heads"] or sizes["n_heads"],
        "head_dim": sizes["head_dim"] or sizes["dim"] // sizes["n_heads"],
        "rope_scaling": None if sizes["rope_scaling"] == "none" else scaling,
    }


def sizes_of(config: "Decoder.Config") -> dict[str, Any]:
    """Every key of ``FIELDS`` with the value that it has in a model.

    Raises:
        UserError: a rotary embedding that a Llama has not.
    """
    block, attention = config.layers[0], config.layers[0].attention
    return {
        "dim": config.dim,
        "n_layers": len(config.layers),
        "n_heads": attention.n_heads,
        "n_kv_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim if attention.head_dim != config.dim // attention.n_heads else None,
        "ffn_dim": block.feed_forward.w1.out_features,
        "vocab_size": config.vocab_size,
        "max_seq_len": attention.rope.max_seq_len,
        "norm_eps": config.norm.eps,
        "enable_weight_tying": config.enable_weight_tying,
        **_rope_of(attention.rope),
    }


def differing(sizes: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Keys of both in which a model computes otherwise than another; how far positions reach is no such difference."""
    unscaled = sizes.get("rope_scaling") == "none"
    keys = [key for key in FIELDS if key != "max_seq_len" and not (unscaled and key in _SCALED)]
    return [key for key in keys if key in sizes and key in others and sizes[key] != others[key]]


def told_apart(said: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What a ``config.json`` says otherwise than a model is, in words; empty if nothing."""
    return ", ".join(
        f"{FIELDS[key]} = {show(said[key])} (model.{key} = {show(ours[key])})" for key in differing(said, ours)
    )


def _check_architecture(config: Mapping[str, Any], fields: "_Fields") -> None:
    if not config.get("architectures") and not config.get("model_type"):
        raise fields.error("architectures", None, f"must be {_ARCHITECTURE}, or model_type {_MODEL_TYPE}")
    named = config.get("architectures") or [_ARCHITECTURE]
    if not isinstance(named, list) or [str(each).lower() for each in named] != [_ARCHITECTURE.lower()]:
        raise fields.error("architectures", named, f"must be {_ARCHITECTURE}, which the models here are")
    for name, why in _ABSENT.items():
        if value := config.get(name):
            raise fields.error(name, value, why)
    for name, (allowed, why) in _FIXED.items():
        if (value := config.get(name)) is not None and value not in allowed:
            raise fields.error(name, value, f"must be {show(allowed[0])}: {why}")


class _Fields:
    """Typed values of a ``config.json``.

    Args:
        values: by name.
        file: the file's path, for the wording of errors.
        places: where the file has those that do not stand at its top.
    """

    def __init__(self, values: Mapping[str, Any], file: str, places: Mapping[str, str] = MappingProxyType({})) -> None:
        self._values, self._file, self._places = values, file, places

    def error(self, name: str, value: Any, problem: str) -> UserError:
        return UserError(f"{self._file}: {self._places.get(name, name)} = {show(value)}: {problem}")

    def size(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, value, "must be a whole number above 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise self.error(name, value, "must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "must be true or false")
        return value

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None and default is None:
            raise UserError(f"{self._file}: {self._places.get(name, name)} is missing")
        return default if value is None else value


def _rope_from_huggingface(config: Mapping[str, Any], file: str, positions: int) -> dict[str, Any]:
    said = _rope_said(config, file)
    values = {name: value for name, (_, value) in said.items()}
    fields = _Fields(values, file, {name: place for name, (place, _) in said.items()})
    kind = values.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise fields.error("rope_type", kind, 'must be "llama3" or "default": the models here know no other')
    if (part := fields.number("partial_rotary_factor", 1.0)) != 1:
        raise fields.error("partial_rotary_factor", part, "must be 1: the models here turn whole heads")
    theta = {"rope_theta": fields.number("rope_theta", 10000.0)}
    if kind == "default":
        return theta | {"rope_scaling": "none"}
    return theta | {
        "rope_scaling": "llama3",
        "rope_scaling_factor": fields.number("factor"),
        "rope_low_freq_factor": fields.number("low_freq_factor"),
        "rope_high_freq_factor": fields.number("high_freq_factor"),
        "rope_original_max_positions": fields.size("original_max_position_embeddings", positions),
    }


def _rope_said(config: Mapping[str, Any], file: str) -> dict[str, tuple[str, Any]]:
    """Place and value, by name, of what a file says of rotary embeddings, in whichever of its places.

    Raises:
        UserError: two places say different things, of which versions of transformers would read one or the other.
    """
    said: dict[str, tuple[str, Any]] = {}
    for place, name, value in _rope_places(config, file):
        if value is None:
            continue
        first, known = said.setdefault(name, (place, value))
        if known != value:
            both = f"{first} = {show(known)} and {place} = {show(value)}"
            raise UserError(f"{file}: {both}: must be the same, or one of them left out")
    return said


def _rope_places(config: Mapping[str, Any], file: str) -> Iterator[tuple[str, str, Any]]:
    """Place, name and value of every field that may speak of rotary embeddings."""
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        yield name, name, config.get(name)
    for table in ("rope_scaling", "rope_parameters"):
        fields = config.get(table) or {}
        if not isinstance(fields, Mapping) or any(isinstance(value, Mapping) for value in fields.values()):
            raise UserError(f"{file}: {table} = {show(fields)}: must be one table for all layers")
        for name, value in fields.items():
            # "type" is what the first versions called it.
            yield f"{table}.{name}", "rope_type" if name == "type" else name, value


def _rope_of(rope: "RoPE.Config") -> dict[str, Any]:
    kinds = {"none": "none", "llama": "llama3"}
    if rope.scaling not in kinds:
        raise UserError(f"model: rotary embeddings scaled by {rope.scaling!r} have no place in a {_ARCHITECTURE}")
    return {
        "rope_theta": rope.theta,
        "rope_scaling": kinds[rope.scaling],
        "rope_scaling_factor": rope.scaling_factor,
        "rope_low_freq_factor": rope.low_freq_factor,
        "rope_high_freq_factor": rope.high_freq_factor,
        "rope_original_max_positions": rope.original_max_position_embeddings,
    }
