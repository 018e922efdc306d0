"""``titan-ext generate`` on a saved model, as a person calls it."""

import re
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from tests.models.abbie_models import SMALL, SPLIT, build
from titan_ext.cli import main

# As many rows as the byte tokenizer's ids come to.
SIZES = SMALL | SPLIT | {"vocab_size": 264}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    """A run's file beside a checkpoint of an initialised model."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = "\n".join(f"{key} = {value}" for key, value in SIZES.items())
    path = folder / "run.toml"
    path.write_text(
        f'dump_folder = "{folder}"\n[model]\nname = "abbie"\nflavor = "tiny"\n{sizes}\n[training]\nseq_len = 64\n'
        '[[site]]\nname = "a"\ndata = "builtin:code"\n'
    )
    dcp.save(build(vocab_size=264).state_dict(), checkpoint_id=folder / "a/checkpoint/step-1", no_dist=True)
    return path


@pytest.fixture
def write(config_file, capsys):
    """Calls the command; returns the text after the prompt, and the iterations a token."""

    def call(*arguments: str) -> tuple[str, float]:
        assert main(["generate", str(config_file), "--prompt=def f", "--max-tokens=12", *arguments]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("def f")
        mean = re.search(r"tokens/s\), ([\d.]+) iterations a token", printed.err).group(1)
        return printed.out.removeprefix("def f"), float(mean)

    return call


def test_the_cache_changes_nothing(write):
    for arguments in (["--temperature=0"], ["--seed=3"], ["--top-k=5", "--top-p=0.9", "--iterations=4"]):
        cached, mean = write(*arguments)
        assert (cached, mean) == write(*arguments, "--no-cache")
        assert mean == (4 if "--iterations=4" in arguments else 2)
    assert write("--seed=3") != write("--seed=4")


def test_early_exit(write):
    assert write("--early-exit=0", "--max-iterations=3") == (write("--iterations=3")[0], 3)
    assert write("--early-exit=2")[1] == 1
    # The default number of iterations at most is 8.
    assert write("--early-exit=0")[1] == 8


def test_beyond_the_length_of_training_is_noted(config_file, capsys):
    assert main(["generate", str(config_file), "--prompt=x", "--max-tokens=70", "--top-k=1"]) == 0
    assert "note: up to 72 tokens, while training saw at most 64 in a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--max-tokens=0"], "--max-tokens 0: must be at least 1"),
        (["--max-tokens=200000"], "must be at most 131,072"),
        (["--temperature=-1"], "--temperature -1: must be a number of at least 0"),
        (["--temperature=nan"], "--temperature nan"),
        (["--top-k=0"], "--top-k 0: must be at least 1"),
        (["--top-p=0"], "--top-p 0: must be above 0 and at most 1"),
        (["--iterations=0"], "--iterations 0: must be at least 1"),
        (["--max-iterations=4"], "--max-iterations 4: needs --early-exit"),
        (["--early-exit=-1"], "--early-exit -1: must be a number of at least 0"),
        (["--early-exit=0.1", "--max-iterations=0"], "--max-iterations 0: must be at least 1"),
        (["--early-exit=0.1", "--iterations=4"], "--iterations 4: not with --early-exit"),
        (["--early-exit=0.1", "--no-cache"], "--no-cache: not with --early-exit"),
        (["--checkpoint=nowhere"], "--checkpoint nowhere: no such folder"),
        (["--model.dim=64"], "is [264, 32], in the model [264, 64]"),
    ],
)
def test_bad_input_is_one_line(config_file, capsys, arguments, words):
    assert main(["generate", str(config_file), "--prompt=x", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize("arguments", [["--iterations=2"], ["--early-exit=0.1"]])
def test_a_model_that_does_not_iterate_takes_no_iterations(config_file, tmp_path, capsys, arguments):
    plain = tmp_path / "plain.toml"
    dropped = re.sub(r"(name = \"abbie\"|(head|body)_layers = \d)\n", "", config_file.read_text())
    plain.write_text(dropped)
    assert main(["generate", str(plain), "--prompt=x", "--max-tokens=4"]) == 0
    assert "1.00 iterations a token" in capsys.readouterr().err
    assert main(["generate", str(plain), "--prompt=x", *arguments]) == 2
    assert "model 'llama3' does not iterate; leave it out" in capsys.readouterr().err
