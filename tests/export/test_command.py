"""``titan-ext export`` as a person calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from titan_ext.cli import main

# The run's weights read as those of an AbbIE: names and shapes are the same.
ABBIE = [
    "--model.name=abbie",
    "--model.skip=none",
    "--model.n_layers=4",
    "--model.head_layers=1",
    "--model.body_layers=2",
]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}


def test_a_body_is_unrolled(config_file, exported, tmp_path, capsys):
    out = tmp_path / "unrolled"
    assert main(["export", str(config_file), *ABBIE, "--iterations=3", f"--out={out}"]) == 0
    assert capsys.readouterr().err == ""
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 8
    found, once = weights_of(out), weights_of(exported)
    for place, source in enumerate([0, 1, 2, 1, 2, 1, 2, 3]):
        names = [name for name in once if name.startswith(f"model.layers.{source}.")]
        assert names
        for name in names:
            assert torch.equal(found[name.replace(f".{source}.", f".{place}.", 1)], once[name])
    assert torch.equal(found["model.norm.weight"], once["model.norm.weight"])


def test_the_last_lines_say_how_to_go_on(config_file, tmp_path, capsys):
    out = tmp_path / "half"
    flags = ["--step=1", "--weights=global", "--checkpoint.export_dtype=bfloat16"]
    assert main(["export", str(config_file), "--site=a", *flags, f"--out={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "304 rows a table" in lines[0] and f'checkpoint.initial_load_path = "{out}"' in lines[1]
    assert lines[-1].strip() == f'tokenizer = "{out}"'
    with safe_open(out / "model-00001-of-00001.safetensors", "pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--site=b"], 'no site "b"'),
        (["--step=9"], 'site "a": no finished checkpoint in'),
        (["--dump_folder=nowhere"], 'site "a": no finished checkpoint in nowhere/a/checkpoint'),
        (["--model.name=abbie", "--model.flavor=tiny-depth"], "has no place in Hugging Face's Llama layout"),
        (["--model.dim=64"], "[304, 96], in the model [304, 64]; model.dim must be 96"),
        (["--model.rope_theta=1e4"], "model.rope_theta = 10000.0: was 500000.0 in the run that saved"),
        (["--model.rope_scaling=none"], 'model.rope_scaling = "none": was "llama3" in the run that saved'),
        (["--model.norm_eps=1e-6"], "model.norm_eps = 1e-06: was 1e-05"),
        (["--model.n_heads=8", "--model.n_kv_heads=4"], "model.n_heads = 8: was 4"),
        (["--stepp=1"], "--stepp: unknown key"),
        (["--iterations=2"], "--iterations 2: model 'llama3' does not iterate"),
        (["--iterations=0", *ABBIE], "--iterations 0: must be at least 1"),
        (["--iterations=2", *ABBIE, "--model.skip=prev"], "model.skip = 'prev'"),
    ],
)
def test_bad_input_is_one_line(config_file, tmp_path, capsys, arguments, words):
    assert main(["export", str(config_file), f"--out={tmp_path / 'out'}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_folder_with_something_in_it_is_left_alone(config_file, exported, capsys):
    assert main(["export", str(config_file), f"--out={exported}"]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["export", "dept"])
def test_reading_the_command_does_not_wait_for_torch(module):
    code = f"import sys, titan_ext.commands.{module}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
