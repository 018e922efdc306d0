"""What is exported computes what the site's model does, wherever it is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.end_to_end.forked import lighthouse, start_site
from tests.export.conftest import ROWS, STEPS, VOCABULARY
from tests.models.abbie_models import initialised
from tests.small_disk import room_for
from titan_ext.config import load_site
from titan_ext.data.tokenizers.byte_tokenizer import VOCABULARY as BYTE_VOCABULARY
from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.errors import RunError, UserError
from titan_ext.export.folder import write_folder
from titan_ext.export.trained import trained_model
from titan_ext.inference.checkpoint import find_checkpoint, load_weights
from titan_ext.inference.model import logits_of
from titan_ext.models import get_model_spec
from titan_ext.models.dept import decouple


def sequences() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, BYTE_VOCABULARY, (2, 48), generator=generator), torch.arange(48).expand(2, 48)


@torch.no_grad()
def test_transformers_computes_the_same_logits(config_file, exported):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(exported)
    tokens, positions = sequences()
    ours = logits_of(trained_model(load_site(config_file)), tokens, positions)
    assert theirs.config.vocab_size == ROWS
    torch.testing.assert_close(theirs(tokens).logits, ours, rtol=1e-4, atol=1e-5)


def test_transformers_reads_the_tokenizer(config_file, exported):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported), build_tokenizer(str(exported))
    text = "a *yield* expression, größer als 中文"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, add_bos=False, add_eos=False)
    assert theirs.bos_token_id == ours.bos_id and theirs.eos_token_id == ours.eos_id


@torch.no_grad()
def test_a_run_starts_from_the_folder(config_file, exported, tmp_path):
    """With learning rate 0 it ends with what it has read."""
    config = tmp_path / "run.toml"
    settings = (config_file.parent / "run.toml").read_text()
    config.write_text(settings.replace(str(config_file.parent / "tokenizer"), str(exported)))
    flags = [f"--checkpoint.initial_load_path={exported}", "--checkpoint.initial_load_in_hf=true"]
    with lighthouse(1) as url:
        site = start_site(config, "a", 1, url, *flags, "--optimizer.lr=0", "--training.steps=1")
        assert site.wait() == [0], site.log()[-3000:]
    before = trained_model(load_site(config_file))
    after = trained_model(load_site(config, overrides=[f"--dump_folder={tmp_path}"]))
    tokens, positions = sequences()
    assert torch.equal(logits_of(after, tokens, positions), logits_of(before, tokens, positions))


def test_the_configuration_says_what_is_there(config_file, exported):
    config = json.loads((exported / "config.json").read_text())
    spec = load_site(config_file).config.model_spec.model
    assert config["vocab_size"] == ROWS and config["tie_word_embeddings"] == spec.enable_weight_tying
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    weights = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in weights) != spec.enable_weight_tying
    assert all((exported / name).is_file() for name in weights.values())


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_masked_rows_are_left_out(tmp_path, tied):
    spec = get_model_spec("llama3", "tiny", vocab_size=BYTE_VOCABULARY + 5, enable_weight_tying=tied)
    masked = decouple(spec, BYTE_VOCABULARY)
    model = initialised(masked.model)
    assert write_folder(tmp_path, model, masked, tokenizer=ByteTokenizer(), assets="") == BYTE_VOCABULARY
    exact = get_model_spec("llama3", "tiny", vocab_size=BYTE_VOCABULARY, enable_weight_tying=tied)
    back = initialised(exact.model, seed=1)
    load_weights(back, exact, find_checkpoint(str(tmp_path), tmp_path))
    assert back.config.enable_weight_tying == (back.lm_head.weight is back.tok_embeddings.weight)
    tokens, positions = sequences()
    ours = logits_of(model, tokens, positions)[..., :BYTE_VOCABULARY]
    torch.testing.assert_close(logits_of(back, tokens, positions), ours, rtol=1e-5, atol=1e-6)


def test_the_byte_tokenizer_gets_files_with_the_same_ids(tmp_path):
    spec = get_model_spec("llama3", "tiny", vocab_size=BYTE_VOCABULARY)
    write_folder(tmp_path, initialised(spec.model), spec, tokenizer=ByteTokenizer(), assets="")
    files, text = build_tokenizer(str(tmp_path)), "".join(map(chr, range(0x180))) + " 中\n\n文 \U0001f600"
    assert files.encode(text, add_bos=True, add_eos=True) == ByteTokenizer().encode(text, add_bos=True, add_eos=True)
    assert files.decode(ByteTokenizer().encode(text)) == text


def test_a_model_without_the_layout_is_refused(tmp_path):
    depth = get_model_spec("abbie", "tiny-depth", vocab_size=BYTE_VOCABULARY)
    with pytest.raises(UserError, match="abbie tiny-depth has no place in Hugging Face's Llama layout"):
        write_folder(tmp_path, initialised(depth.model), depth, tokenizer=ByteTokenizer(), assets="")
    spec = get_model_spec("llama3", "tiny", vocab_size=BYTE_VOCABULARY)
    attention = spec.model.layers[0].attention
    attention.rope = replace(attention.rope, scaling="yarn")
    with pytest.raises(UserError, match="scaled by 'yarn'"):
        write_folder(tmp_path, initialised(spec.model), spec, tokenizer=ByteTokenizer(), assets="")
    assert not any(Path(tmp_path).iterdir())


def test_half_a_folder_is_not_left(tmp_path):
    spec = get_model_spec("llama3", "tiny", vocab_size=BYTE_VOCABULARY)
    model = initialised(spec.model)
    with room_for(5000), pytest.raises(RunError, match="cannot be written"):
        write_folder(tmp_path, model, spec, tokenizer=ByteTokenizer(), assets="")
    assert not any(tmp_path.iterdir())


def test_step_and_weights_are_chosen(config_file):
    """Step 2 ends with a round; step 3 moves the site's own parameters, not the global ones."""
    site = load_site(config_file)
    found = [
        dict(trained_model(site, step, weights).named_parameters())
        for step, weights in ((2, "site"), (STEPS, "global"), (None, "site"))
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(torch.equal(found[0][name], found[2][name]) for name in found[0])
    assert found[0]["tok_embeddings.weight"].shape[0] == ROWS > VOCABULARY
