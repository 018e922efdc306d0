"""What a run that starts from a Hugging Face folder takes from it, compares with it and says of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.huggingface.llamas import LLAMA_31, Llama, change_weights, write_llama
from titan_ext.cli import main
from titan_ext.config import load_run, load_site, save_resolved
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.errors import UserError
from titan_ext.export.tokenizer_files import write_tokenizer
from titan_ext.models.llama3.huggingface import sizes_of

LLAMA = Llama(dim=96, layers=3, heads=6, kv_heads=3, ffn_dim=160, eps=1e-6, scaling=LLAMA_31 | {"factor": 32.0})
SAID = {
    "dim": 96,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 3,
    "ffn_dim": 160,
    "vocab_size": 264,
    "max_seq_len": 256,
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "rope_scaling": "llama3",
    "rope_scaling_factor": 32.0,
    "rope_original_max_positions": 64,
}

RUN = """
[model]
name = "llama3"
MODEL
[training]
seq_len = 64
steps = 4
[checkpoint]
enable = true
initial_load_in_hf = true
initial_load_path = "PATH"
[[site]]
name = "a"
data = "builtin:code"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", LLAMA)


@pytest.fixture
def config(tmp_path, monkeypatch, folder):
    """Writes a run that starts from the folder, with more lines of ``[model]``; returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(model: str = "", path: Path | str = folder) -> str:
        Path("run.toml").write_text(RUN.replace("MODEL", model).replace("PATH", str(path)))
        return "run.toml"

    return write


def model_of(site) -> dict:
    return {key: site.model.overrides[key] for key in SAID}


def test_a_silent_model_is_the_checkpoints(config):
    site = load_site(config())
    assert model_of(site) == SAID
    attention = site.config.model_spec.model.layers[2].attention
    assert (attention.n_heads, attention.rope.scaling_factor, attention.rope.max_seq_len) == (6, 32.0, 256)
    assert site.config.model_spec.model.layers[1].ffn_norm.eps == 1e-6


def test_keys_that_agree_may_be_said(config):
    said = "\n".join(f"{key} = {json.dumps(value)}" for key, value in SAID.items())
    assert model_of(load_site(config(said))) == SAID


def test_a_flavor_of_the_same_sizes_leaves_the_rest_to_the_checkpoint(config, tmp_path):
    sizes = {"dim": 96, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 24, "ffn_dim": 256}
    tiny = Llama(**sizes, eps=1e-6, theta=1e4, scaling=None, tied=True)
    site = load_site(config('flavor = "tiny"', write_llama(tmp_path / "tiny", tiny)))
    wanted = {"norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": "none", "enable_weight_tying": True}
    assert site.model.overrides.items() >= wanted.items() and "dim" not in site.model.overrides


@pytest.mark.parametrize(
    "said, words",
    [
        ("dim = 64", ["model.dim = 64", "hidden_size = 96"]),
        ("n_layers = 2", ["model.n_layers = 2", "num_hidden_layers = 3"]),
        ("n_heads = 3", ["model.n_heads = 3", "num_attention_heads = 6"]),
        ("n_kv_heads = 6", ["model.n_kv_heads = 6", "num_key_value_heads = 3"]),
        ("head_dim = 32", ["model.head_dim = 32", "head_dim = null"]),
        ("ffn_dim = 256", ["model.ffn_dim = 256", "intermediate_size = 160"]),
        ("vocab_size = 512", ["model.vocab_size = 512", "vocab_size = 264"]),
        ("norm_eps = 1e-5", ["model.norm_eps = 1e-05", "rms_norm_eps = 1e-06"]),
        ("enable_weight_tying = true", ["model.enable_weight_tying = true", "tie_word_embeddings = false"]),
        ("rope_theta = 10000.0", ["model.rope_theta = 10000.0", "rope_theta = 500000.0"]),
        ('rope_scaling = "none"', ['model.rope_scaling = "none"', 'rope_type = "llama3"']),
        ("rope_scaling_factor = 8.0", ["model.rope_scaling_factor = 8.0", "factor = 32.0"]),
        ("rope_low_freq_factor = 2.0", ["model.rope_low_freq_factor = 2.0", "low_freq_factor = 1.0"]),
        ("rope_high_freq_factor = 8.0", ["model.rope_high_freq_factor = 8.0", "high_freq_factor = 4.0"]),
        ("rope_original_max_positions = 8192", ["model.rope_original_max_positions = 8192", "embeddings = 64"]),
        ('flavor = "tiny"', ['model.flavor = "tiny"', "num_hidden_layers = 3 (model.n_layers = 4)"]),
        ('flavor = "1B"', ['model.flavor = "1B"', "hidden_size = 96 (model.dim = 2048)"]),
    ],
)
def test_what_the_file_says_otherwise_is_refused(said, words, config, folder, capsys):
    assert main(["check", config(said)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in [*words, "run.toml", str(folder / "config.json"), "leave the key out"])


def test_flags_count_as_said(config):
    with pytest.raises(UserError, match="flag --model.rope_scaling = .none.: .*rope_type = .llama3."):
        load_site(config(), overrides=["--model.rope_scaling=none"])
    site = load_site(config(), overrides=["--model.rope_scaling_factor=32"])
    assert site.model.overrides["rope_scaling_factor"] == 32.0


def test_positions_may_reach_less_far_but_sequences_not_further(config):
    assert load_site(config("max_seq_len = 64")).config.model_spec.model.max_seq_len == 64
    with pytest.raises(UserError, match="training.seq_len = 512: must be at most 256, the model's longest"):
        load_site(config(), overrides=["--training.seq_len=512"])


def test_check_shows_what_is_taken_over(config, capsys):
    assert main(["check", config()]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for key, value in SAID.items():
        assert [key, "=", json.dumps(value), "#", "weights"] in lines


def test_what_a_run_records_is_the_same_model(config):
    site = load_site(config())
    Path(site.config.dump_folder).mkdir(parents=True)
    recorded = save_resolved(site)
    again = load_site(recorded)
    assert again.model == site.model
    assert sizes_of(again.config.model_spec.model) == sizes_of(site.config.model_spec.model)


def test_a_recorded_run_goes_on_when_the_folder_is_gone(config, folder):
    site = load_site(config())
    Path(site.config.dump_folder).mkdir(parents=True)
    save_resolved(site)
    shutil.rmtree(folder)
    assert load_site(config()).model == site.model
    with pytest.raises(UserError, match="model.n_layers = 2"):
        load_site(config("n_layers = 2"))


def test_a_folder_that_is_not_there_is_missing_and_no_mistake(config, tmp_path, capsys):
    path = config(path=tmp_path / "elsewhere")
    assert main(["check", path]) == 0
    output = capsys.readouterr().out
    assert "1 thing missing on this machine" in output
    assert f'checkpoint.initial_load_path = "{tmp_path / "elsewhere"}": no such folder' in output
    with pytest.raises(UserError, match="no such folder; the model's sizes are read from its config.json"):
        load_run(path)


def test_the_weights_are_looked_at_too(config, folder, capsys):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert main(["check", config()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no model.layers.1.mlp.up_proj.weight" in line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--checkpoint.enable=false"], "initial_load_path = .*: nothing is loaded without checkpoint.enable = true"),
        (["--checkpoint.initial_load_in_hf=false"], "initial_load_path = .*set checkpoint.initial_load_in_hf = true"),
        (["--checkpoint.initial_load_path=none"], "checkpoint.initial_load_in_hf = .*needs the folder"),
        (["--model.name=abbie", "--model.flavor=tiny-depth"], "abbie tiny-depth has no Hugging Face format"),
        (["--dept.variant=trim"], "vocabulary = .*a part of the tokenizer's"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(flags, words, config):
    with pytest.raises(UserError, match=words):
        load_site(config(), overrides=flags)


def test_the_tokenizers_folder_may_be_the_models(config, folder, text_corpus):
    train_tokenizer([path.read_text() for path in sorted(text_corpus.glob("*.txt"))], 264, folder)
    flags = ["--checkpoint.initial_load_path=none", f"--tokenizer={folder}"]
    site = load_site(config(), overrides=flags)
    assert model_of(site) == SAID and not site.notes
    other = load_site(config(), overrides=["--tokenizer=byte"])
    assert any('tokenizer = "byte" is not' in note for note in other.notes)
    write_tokenizer(folder, assets="")  # bytes, as files
    assert not any("is not" in note for note in load_site(config(), overrides=["--tokenizer=byte"]).notes)


def test_a_tokenizer_of_more_ids_than_rows_is_refused(config, tmp_path):
    few = write_llama(tmp_path / "few", replace(LLAMA, vocabulary=200))
    with pytest.raises(UserError, match='tokenizer = "byte": has 259 ids, the weights 200 rows'):
        load_site(config(path=few))


def test_a_tokenizer_of_fewer_ids_is_noted(config, tmp_path):
    many = write_llama(tmp_path / "many", replace(LLAMA, vocabulary=512))
    site = load_site(config(path=many))
    assert site.config.model_spec.model.vocab_size == 512
    assert any("512 embedding rows, the tokenizer 259 ids" in note for note in site.notes)


def test_a_folder_without_a_description_leaves_the_model_to_the_file(config, folder):
    (folder / "config.json").unlink()
    site = load_site(config('flavor = "tiny"'))
    assert "dim" not in site.model.overrides and any("has no config.json" in note for note in site.notes)


def test_sites_that_start_from_other_models_are_refused(config, tmp_path):
    other = write_llama(tmp_path / "other", replace(LLAMA, theta=1e4))
    second = f'\n[[site]]\nname = "b"\ndata = "builtin:docs"\ncheckpoint.initial_load_path = "{other}"\n'
    path = Path(config())
    path.write_text(path.read_text() + second)
    with pytest.raises(UserError, match="differ in model.rope_theta: 500000.0 and 10000.0"):
        load_run(path)


def test_a_specs_own_package_is_compared_where_it_is_a_llama(config, folder):
    """torchtitan's own takes nothing over, and its rotary embedding is fixed."""
    from torchtitan.models import llama3

    from titan_ext.config.initial import check_source, open_source
    from titan_ext.config.settings import Settings

    settings, spec = Settings("run.toml"), llama3.model_registry("debugmodel")
    with pytest.raises(UserError, match="hidden_size = 96 .model.dim = 256"):
        check_source(settings, open_source(folder), llama3, spec)


def test_a_last_checkpoint_with_rows_for_no_token_is_refused(config):
    flags = ["--dept.variant=glob", "--checkpoint.last_save_in_hf=true", "--checkpoint.last_save_model_only=true"]
    with pytest.raises(UserError, match="checkpoint.last_save_in_hf = true: the last 5 rows stand for no token"):
        load_site(config(), overrides=flags)
