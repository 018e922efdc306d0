"""Runs that start from a Hugging Face folder, and the folders that they leave."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.end_to_end.forked import SiteRun, start_site
from tests.huggingface.llamas import LLAMA_31, Llama, change_weights, logits, write_llama
from titan_ext.cli import main
from titan_ext.config import load_site
from titan_ext.inference.checkpoint import find_checkpoint
from titan_ext.inference.model import load_model, logits_of

RUN = """
[model]
name = "llama3"
MODEL
[training]
seq_len = 32
local_batch_size = 2
steps = 1
mixed_precision_param = "float32"
[optimizer]
lr = 0.0
[metrics]
enable_tensorboard = false
[checkpoint]
enable = true
LOAD
[[site]]
name = "a"
data = "builtin:code"
"""
FROM_FOLDER = 'initial_load_in_hf = true\ninitial_load_path = "PATH"'
LLAMA_32 = Llama(scaling=LLAMA_31 | {"factor": 32.0}, tied=True, dtype=torch.bfloat16, files=3, eps=1e-6)
LLAMA_2 = Llama(kv_heads=4, theta=1e4, scaling=None)
NOWHERE = "http://127.0.0.1:1"  # a site alone needs no lighthouse
TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(3))


def start(tmp_path: Path, load: str, *flags: str, model: str = "", ranks: int = 1) -> SiteRun:
    config = tmp_path / "run.toml"
    config.write_text(RUN.replace("LOAD", load).replace("MODEL", model))
    return start_site(config, "a", ranks, NOWHERE, *flags)


def refusal(site: SiteRun) -> str:
    """The one line with which a site that was given bad input ends, by an exit code that is not restarted."""
    assert site.wait() == [2], site.log()[-3000:]
    assert "Traceback" not in site.log()
    (line,) = [line for line in site.log().splitlines() if line.startswith("titan-ext: error:")]
    return line


@pytest.mark.parametrize(
    "llama, flags",
    [
        (LLAMA_32, ["--parallelism.data_parallel_shard_degree=2"]),
        (LLAMA_2, ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_microbatch_size=1"]),
    ],
    ids=["Llama 3.2, sharded", "Llama 2, pipelined"],
)
def test_what_is_imported_is_what_is_exported(llama, flags, tmp_path):
    """At learning rate 0, from a file that says nothing of the model's sizes."""
    folder = write_llama(tmp_path / "model", llama)
    site = start(tmp_path, FROM_FOLDER.replace("PATH", str(folder)), *flags, ranks=2)
    assert site.wait() == [0, 0], site.log()[-3000:]
    config, out = tmp_path / "run.toml", tmp_path / "exported"
    assert main(["export", str(config), f"--dump_folder={tmp_path}", f"--out={out}"]) == 0
    then, now = (json.loads((each / "config.json").read_text()) for each in (folder, out))
    assert {name: now[name] for name in then if name != "torch_dtype"} == {
        name: then[name] for name in then if name != "torch_dtype"
    }
    expected = logits(folder, llama, TOKENS)
    torch.testing.assert_close(logits(out, llama, TOKENS), expected, rtol=0, atol=1e-6)
    again = load_model(load_site(config, weights=out), find_checkpoint(str(out), Path()))
    with torch.no_grad():
        ours = logits_of(again, TOKENS, torch.arange(32).expand(2, 32))
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), "has no model.layers.1.mlp.up_proj.weight"),
        (lambda weights: weights.update({"model.norm.bias": torch.ones(64)}), "norm.bias, which the model has not"),
    ],
    ids=["missing", "surplus"],
)
def test_other_tensors_end_a_run_at_once(change, words, tmp_path):
    folder = change_weights(write_llama(tmp_path / "model"), change)
    assert words in refusal(start(tmp_path, FROM_FOLDER.replace("PATH", str(folder))))


def test_a_tensor_in_two_files_ends_a_run_at_once(tmp_path):
    folder = write_llama(tmp_path / "model")
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "zz.safetensors")
    assert "lm_head.weight is in model.safetensors and in zz.safetensors" in refusal(
        start(tmp_path, FROM_FOLDER.replace("PATH", str(folder)))
    )


def test_the_last_checkpoint_says_what_it_is(tmp_path, capsys):
    folder = write_llama(tmp_path / "model", LLAMA_2)
    last = "\nlast_save_model_only = true\nlast_save_in_hf = true"
    site = start(tmp_path, FROM_FOLDER.replace("PATH", str(folder)) + last)
    assert site.wait() == [0], site.log()[-3000:]
    left = tmp_path / "a" / "checkpoint" / "step-1"
    said = json.loads((left / "config.json").read_text())
    assert (said["rope_theta"], said["rope_scaling"], said["max_position_embeddings"]) == (1e4, None, 256)
    torch.testing.assert_close(logits(left, LLAMA_2, TOKENS), logits(folder, LLAMA_2, TOKENS), rtol=0, atol=1e-6)
    flags = [f"--dump_folder={tmp_path}", "--corpus=builtin:docs", "--tokens=64"]
    assert main(["eval", str(tmp_path / "run.toml"), *flags]) == 0
    assert "has no config.json" not in capsys.readouterr().out


def test_a_distributed_checkpoint_of_another_model_is_refused_too(tmp_path):
    """Whether it is a run's first or it is gone on with, and whether or not shapes tell."""
    site = start(tmp_path, "", model='flavor = "tiny"\nn_layers = 2')
    assert site.wait() == [0], site.log()[-3000:]
    (tmp_path / "rank_a_0.txt").unlink()
    heads = start(tmp_path, "", model='flavor = "tiny"\nn_layers = 2\nn_heads = 8\nn_kv_heads = 4')
    assert "model.n_heads = 8: was 4 in this run so far" in refusal(heads)
    (tmp_path / "next").mkdir()
    load = f'initial_load_path = "{tmp_path / "a" / "checkpoint" / "step-1"}"'
    for layers, words in ((1, "which the model has not; model.n_layers must be 2"), (3, "model.n_layers must be 2")):
        another = start(tmp_path / "next", load, model=f'flavor = "tiny"\nn_layers = {layers}')
        assert words in refusal(another)
        (tmp_path / "next" / "rank_a_0.txt").unlink()
    turned = start(tmp_path / "next", load, model='flavor = "tiny"\nn_layers = 2\nrope_theta = 1e6')
    assert turned.wait() == [0] and "model.rope_theta = 1000000.0: was 500000.0 in the run that saved" in turned.log()
