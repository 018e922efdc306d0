"""Weight files that are not those of the model are refused from their headers, each in one line."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.huggingface.llamas import Llama, change_weights, write_llama
from titan_ext.errors import UserError
from titan_ext.huggingface.fit import check_weights
from titan_ext.huggingface.weights import INDEX, stored_tensors
from titan_ext.models import get_model_spec
from titan_ext.models.fit import model_tensors
from titan_ext.models.llama3 import from_huggingface

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
LLAMA = Llama()


def check(folder, llama=LLAMA):
    spec = get_model_spec("llama3", "tiny", **from_huggingface(llama.config(), ""))
    check_weights(folder, spec.model, spec.state_dict_adapter)


def refused(folder, llama=LLAMA) -> str:
    with pytest.raises(UserError) as caught:
        check(folder, llama)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("llama", [Llama(), Llama(files=3), Llama(tied=True), Llama(dtype=torch.bfloat16)])
def test_a_whole_folder_passes(llama, tmp_path):
    check(write_llama(tmp_path, llama), llama)


def test_buffers_and_a_head_that_is_the_embedding_may_stand_beside(tmp_path):
    def beside(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        weights[HEAD] = weights[EMBEDDING].clone()

    check(change_weights(write_llama(tmp_path, Llama(tied=True)), beside), Llama(tied=True))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop(Q_PROJ), f"has no {Q_PROJ}, which the model has"),
        (lambda w: w.pop(HEAD), f"has no {HEAD}, which the model has"),
        (lambda w: w.pop("model.norm.weight"), "has no model.norm.weight"),
        (lambda w: w.update({Q_PROJ.replace("weight", "bias"): torch.ones(64)}), "q_proj.bias, which the model has"),
        (lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), "q_norm.weight, which"),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)}), "layers.2.mlp.up_proj.weight"),
        (lambda w: w.update({Q_PROJ: torch.ones(128, 64)}), f"{Q_PROJ} is [128, 64], in the model [64, 64]"),
        (lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.float8_e4m3fn)}), f"{Q_PROJ} is of type F8_E4M3: quantised"),
        (lambda w: w.update({Q_PROJ: w[Q_PROJ].to(torch.int8)}), f"{Q_PROJ} is of type I8: quantised"),
        (lambda w: w.update({EMBEDDING: w[EMBEDDING].to(torch.uint8)}), f"{EMBEDDING} is of type U8: quantised"),
    ],
)
def test_other_tensors_are_refused(change, words, tmp_path):
    assert words in refused(change_weights(write_llama(tmp_path), change))


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path):
    folder = write_llama(tmp_path, Llama(tied=True))
    change_weights(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING] + 1}))
    assert "lm_head.weight is not model.embed_tokens.weight" in refused(folder, Llama(tied=True))


@pytest.mark.parametrize("other", ["zz.safetensors", "aa.safetensors", "model-00001-of-00001.safetensors"])
def test_a_name_in_two_files_is_refused(other, tmp_path):
    folder = write_llama(tmp_path)
    save_file({HEAD: torch.zeros(2)}, folder / other)
    message = refused(folder)
    assert HEAD in message and other in message and "model.safetensors" in message


def test_a_stray_file_is_named(tmp_path):
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, write_llama(tmp_path) / "consolidated.safetensors")
    assert "(in consolidated.safetensors)" in refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 0.02, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused(keep, tmp_path):
    file = write_llama(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert "model.safetensors: cannot be read, it may be cut short" in refused(tmp_path)


def test_a_pointer_in_place_of_the_weights_is_said(tmp_path):
    (write_llama(tmp_path) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    assert "is a pointer of Git LFS" in refused(tmp_path)


@pytest.mark.parametrize(
    "held, words",
    [
        ({}, "holds no *.safetensors"),
        ({"config.json": "{}"}, "holds no *.safetensors"),
        ({"pytorch_model.bin": "x"}, "holds pytorch_model.bin, not safetensors"),
        ({"pytorch_model-00001-of-00002.bin": "x"}, "holds pytorch_model-00001-of-00002.bin, not safetensors"),
        ({"consolidated.00.pth": "x"}, "holds consolidated.00.pth, not safetensors"),
        ({"model.Q4_K_M.gguf": "x"}, "holds model.Q4_K_M.gguf, not safetensors"),
        ({".metadata": "x"}, "of a checkpoint of torch's"),
    ],
)
def test_a_folder_without_safetensors_is_refused(held, words, tmp_path):
    for name, content in held.items():
        (tmp_path / name).write_text(content)
    assert words in refused(tmp_path)


def indexed(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_file_is_named(tmp_path):
    (write_llama(tmp_path, Llama(files=3)) / SHARDS[1]).unlink()
    assert f"names {SHARDS[1]}, which is not in the folder" in refused(tmp_path)


def test_all_files_missing_is_the_same(tmp_path):
    for shard in SHARDS:
        (write_llama(tmp_path, Llama(files=3)) / shard).unlink()
    assert "which is not in the folder" in refused(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda files: files.pop(HEAD), f"holds {HEAD}, which {INDEX} does not name"),
        (lambda files: files.update({HEAD: SHARDS[(SHARDS.index(files[HEAD]) + 1) % 3]}), "which does not hold it"),
        (lambda files: files.update({"model.layers.2.mlp.up_proj.weight": SHARDS[0]}), "which does not hold it"),
        (lambda files: files.update({HEAD: 3}), "weight_map must name a file for each tensor"),
    ],
)
def test_an_index_that_says_otherwise_is_refused(change, words, tmp_path):
    indexed(write_llama(tmp_path, Llama(files=3)), change)
    assert words in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(content, tmp_path):
    (write_llama(tmp_path) / INDEX).write_text(content)
    assert INDEX in refused(tmp_path)


@pytest.mark.parametrize(
    "stored, words",
    [
        (Llama(dim=96, heads=6, kv_heads=2), "model.dim must be 96"),
        (Llama(vocabulary=300), "model.vocab_size must be 300"),
        (Llama(ffn_dim=128), "model.ffn_dim must be 128"),
        (Llama(layers=3), "model.n_layers must be 3"),
        (Llama(layers=1), "model.n_layers must be 1"),
        (Llama(kv_heads=4), "model.n_kv_heads or head_dim must fit"),
        (Llama(heads=8), "model.n_heads or head_dim must fit"),
        (Llama(tied=True), "model.enable_weight_tying must be true"),
    ],
)
def test_without_a_description_the_key_to_set_is_named(stored, words, tmp_path):
    (write_llama(tmp_path, stored) / "config.json").unlink()
    assert words in refused(tmp_path, Llama())


def test_with_one_the_folder_is_at_odds_with_itself(tmp_path):
    write_llama(tmp_path, Llama(ffn_dim=128), intermediate_size=96)
    assert "config.json and the weights do not belong together" in refused(tmp_path, replace(Llama(), ffn_dim=96))


def test_a_model_that_is_not_the_described_one_is_refused(tmp_path):
    """The same shapes: only the description tells."""
    write_llama(tmp_path, Llama(scaling=None))
    words = 'config.json says rope_type = "none" (model.rope_scaling = "llama3"); [model] must be the same'
    assert words in refused(tmp_path)


def test_other_families_are_looked_at_by_their_own_names(tmp_path, caplog):
    """What torchtitan does not read of them is said; what it misses is refused."""
    from torchtitan.models import qwen3

    spec = qwen3.model_registry("debugmodel")
    tensors = {name: torch.zeros(shape) for name, shape in model_tensors(spec.model, spec.state_dict_adapter).items()}
    save_file(tensors | {"model.layers.99.eh_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    check_weights(tmp_path, spec.model, spec.state_dict_adapter)
    assert "1 tensors are not read, such as model.layers.99.eh_proj.weight" in caplog.text
    name = "model.layers.0.self_attn.q_norm.weight"
    save_file({each: tensor for each, tensor in tensors.items() if each != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"has no {name}, which the model has"):
        check_weights(tmp_path, spec.model, spec.state_dict_adapter)
    check_weights(tmp_path, spec.model, spec.state_dict_adapter, quantised=True)


def test_names_and_types_are_those_of_the_headers(tmp_path):
    found = stored_tensors(write_llama(tmp_path, Llama(files=2, dtype=torch.bfloat16)))
    assert found[EMBEDDING].shape == (264, 64) and {each.dtype for each in found.values()} == {"BF16"}
