"""``config.json`` into keys of ``[model]`` and back, and what is refused by its name."""

import json
from dataclasses import replace

import pytest
import torch

from tests.huggingface.llamas import LLAMA_31, Llama, write_llama
from titan_ext.errors import UserError
from titan_ext.export.llama import llama_config
from titan_ext.huggingface.description import read_description
from titan_ext.models import get_model_spec
from titan_ext.models.llama3 import from_huggingface
from titan_ext.models.llama3.huggingface import differing, sizes_of


class Tokenizer:
    """What an export asks of a tokenizer."""

    eos_id = 1


@pytest.mark.parametrize(
    "name, flavor, overrides",
    [
        ("llama3", "tiny", {}),
        ("llama3", "8B", {"n_layers": 2}),
        ("llama3", "1B", {"n_layers": 2}),
        ("llama3", "tiny", {"rope_scaling": "none", "rope_theta": 10000.0, "norm_eps": 1e-6}),
        ("llama3", "tiny", {"rope_scaling_factor": 32.0, "rope_low_freq_factor": 0.5, "rope_high_freq_factor": 7.0}),
        ("llama3", "tiny", {"rope_original_max_positions": 2048, "max_seq_len": 4096, "n_kv_heads": 4}),
        ("llama3", "tiny", {"head_dim": 32, "enable_weight_tying": True}),
        ("dept", "tiny", {}),
        ("abbie", "tiny", {"n_kv_heads": None}),
    ],
)
def test_what_is_written_is_what_is_read(name, flavor, overrides):
    """From a model to config.json to [model] to the same model."""
    model = get_model_spec(name, flavor, **overrides).model
    written = json.dumps(llama_config(model, model.vocab_size, Tokenizer(), torch.float32))
    again = get_model_spec("llama3", "debugmodel", **from_huggingface(json.loads(written), "config.json")).model
    assert not differing(sizes_of(model), sizes_of(again))
    assert again.max_seq_len == model.max_seq_len


@pytest.mark.parametrize(
    "written, key, value",
    [
        ({"num_key_value_heads": None}, "n_kv_heads", 4),
        ({"head_dim": None}, "head_dim", None),
        ({"head_dim": 32}, "head_dim", 32),
        ({"rms_norm_eps": None}, "norm_eps", 1e-6),
        ({"tie_word_embeddings": None}, "enable_weight_tying", False),
        ({"max_position_embeddings": None}, "max_seq_len", 2048),
        ({"rope_theta": None, "rope_scaling": None}, "rope_theta", 10000.0),
        ({"rope_theta": 1000000}, "rope_theta", 1e6),
        ({"rope_scaling": None}, "rope_scaling", "none"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling", "none"),
        ({"rope_scaling": {"type": "default"}}, "rope_scaling", "none"),
        ({"rope_scaling": LLAMA_31 | {"type": "llama3"}}, "rope_scaling", "llama3"),
        ({"rope_scaling": LLAMA_31 | {"factor": 32}}, "rope_scaling_factor", 32.0),
        ({"rope_scaling": {**LLAMA_31, "original_max_position_embeddings": None}}, "rope_original_max_positions", 256),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000}}, "rope_theta", 5e5),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 7e4}}, "rope_theta", 7e4),
        ({"rope_scaling": None, "rope_parameters": LLAMA_31}, "rope_low_freq_factor", 1.0),
        ({"hidden_act": "swish"}, "dim", 64),
        ({"architectures": None}, "dim", 64),
        ({"architectures": ["LLaMAForCausalLM"], "model_type": None}, "dim", 64),
        ({"torch_dtype": "bfloat16", "pretraining_tp": 2, "attention_dropout": 0.1}, "dim", 64),
    ],
)
def test_fields_left_out_mean_what_transformers_takes_them_for(written, key, value):
    config = {name: each for name, each in (Llama().config() | written).items() if each is not None}
    assert from_huggingface(config, "config.json")[key] == value


@pytest.mark.parametrize(
    "written, words",
    [
        ({"architectures": ["MistralForCausalLM"]}, 'architectures = ["MistralForCausalLM"]'),
        ({"architectures": ["Qwen2ForCausalLM"]}, 'architectures = ["Qwen2ForCausalLM"]'),
        ({"architectures": ["GemmaForCausalLM"]}, "must be LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, 'architectures = ["LlamaModel"]'),
        ({"architectures": "LlamaForCausalLM"}, "architectures = "),
        ({"architectures": None, "model_type": None}, "architectures = null: must be LlamaForCausalLM"),
        ({"model_type": "mistral"}, 'model_type = "mistral": must be "llama"'),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map = "),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights are not read"),
        ({"quantization_config": {"quant_method": "fp8"}}, 'quantization_config = {"quant_method": "fp8"}'),
        ({"compression_config": {"format": "pack"}}, "compression_config = "),
        ({"attention_bias": True}, "attention_bias = true: must be false"),
        ({"mlp_bias": True}, "mlp_bias = true: must be false"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu": must be "silu"'),
        ({"hidden_act": "relu"}, 'hidden_act = "relu"'),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"vocab_size": "264"}, 'vocab_size = "264": must be a whole number'),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: must be a whole number above 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = true: must be a whole number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05: must be a number above 0"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings = "yes": must be true or false'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type = "linear"'),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'rope_scaling.rope_type = "dynamic"'),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters.rope_type = "yarn"'),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, '"longrope": must be "llama3" or "default"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": "llama3"}, 'rope_scaling = "llama3": must be one table'),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters = "),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta = 500000.0 and rope_parameters.rope_theta = 10000.0"),
        ({"rope_parameters": {"factor": 32.0}}, "rope_scaling.factor = 8.0 and rope_parameters.factor = 32.0"),
        ({"rope_scaling": LLAMA_31 | {"type": "linear"}}, "must be the same"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: must be 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor = 0.25"),
    ],
)
def test_another_model_is_refused_by_name(written, words):
    config = {name: each for name, each in (Llama().config() | written).items() if each is not None}
    with pytest.raises(UserError) as caught:
        from_huggingface(config, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3"])
def test_other_families_as_transformers_writes_them_are_refused(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes, architectures=[f"{name}ForCausalLM"])
    with pytest.raises(UserError, match="architectures|model_type"):
        from_huggingface(config.to_dict(), "config.json")


@pytest.mark.parametrize(
    "content, words",
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "must be one JSON object"),
        (b"\xff\xfe{", "cannot be read"),
    ],
)
def test_a_file_that_describes_no_model_is_refused(content, words, tmp_path):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        read_description(tmp_path)


def test_an_adapter_is_refused_though_a_model_lies_beside_it(tmp_path):
    (write_llama(tmp_path) / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="adapter_config.json: is of an adapter, not a model"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"rope_scaling": "llama"}, "model.rope_scaling = 'llama': must be one of none, llama3"),
        ({"rope_scaling_factor": 0.0}, "model.rope_scaling_factor = 0.0: must be above 0"),
        ({"rope_high_freq_factor": 1.0}, "must be above model.rope_low_freq_factor"),
        ({"norm_eps": -1.0}, "model.norm_eps = -1.0: must be above 0"),
        ({"head_dim": 15}, "model.head_dim = 15: must be even"),
    ],
)
def test_keys_of_the_model_have_bounds(overrides, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        get_model_spec("llama3", "tiny", **overrides)


@pytest.mark.parametrize("flavor, factor", [("1B", 32.0), ("3B", 32.0), ("8B", 8.0), ("70B", 8.0), ("405B", 8.0)])
def test_flavors_turn_as_the_models_of_that_size(flavor, factor):
    """Llama 3.2's two sizes, and those of 3.1."""
    rope = get_model_spec("llama3", flavor, n_layers=1).model.layers[0].attention.rope
    assert (rope.scaling, rope.scaling_factor, rope.theta) == ("llama", factor, 500000.0)


def test_llamas_that_differ_differ_in_a_key():
    base = Llama()
    others = [
        replace(base, eps=1e-6),
        replace(base, theta=1e4),
        replace(base, scaling=None),
        replace(base, heads=2, head_dim=32, kv_heads=1),  # the same shapes
        replace(base, tied=True),
    ]
    said = from_huggingface(base.config(), "")
    for other in others:
        assert differing(from_huggingface(other.config(), ""), said)
