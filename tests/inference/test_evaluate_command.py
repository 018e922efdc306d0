"""``titan-ext eval`` on the checkpoints of a real run, as a person calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.conftest import STEPS
from titan_ext.cli import main
from titan_ext.data.tokenizers.bpe import train_tokenizer

TOKENS = "--tokens=1280"


def test_each_count_is_measured_from_one_checkpoint(evaluate, saved_run):
    report = evaluate("--iterations=1,2,4", TOKENS)
    assert (report["site"], report["step"], report["weights"]) == ("a", STEPS, "site")
    assert [row["iterations"] for row in report["perplexity"]] == [1, 2, 4]
    assert [row["tokens"] for row in report["perplexity"]] == [1280] * 3
    losses = [row["loss"] for row in report["perplexity"]]
    assert len(set(losses)) == 3
    (alone,) = evaluate(TOKENS, "--batch-size=7")["perplexity"]
    assert alone["iterations"] == 2 and alone["loss"] == pytest.approx(losses[1], rel=1e-5)
    # Held-out text of the same kind: what a few steps have taught.
    assert abs(losses[1] - saved_run.losses()[-1]) < 1


def test_the_recurrence_can_be_another_than_in_training(evaluate):
    """The skips "prev" and "input" are the same up to two iterations."""
    rows = [evaluate("--iterations=2,4", TOKENS, *more)["perplexity"] for more in ([], ["--model.skip=input"])]
    assert rows[0][0]["loss"] == rows[1][0]["loss"] and rows[0][1]["loss"] != rows[1][1]["loss"]


def test_steps_and_weights_can_be_chosen(evaluate, config_file):
    folder = config_file.parent / "a" / "checkpoint"
    found = [
        evaluate(TOKENS, f"--checkpoint={folder / step}", f"--weights={weights}")["perplexity"][0]["loss"]
        for step, weights in (("step-2", "site"), ("step-3", "global"), ("step-3", "site"))
    ]
    assert found[0] == found[1] != found[2]


def test_another_model_of_the_same_shapes_is_noted(config_file, capsys):
    folder = config_file.parent / "a" / "checkpoint" / "step-3"
    arguments = ["eval", str(config_file), f"--dump_folder={config_file.parent}", TOKENS, f"--checkpoint={folder}"]
    assert main([*arguments, "--model.rope_theta=1e4"]) == 0
    assert "note        model.rope_theta = 10000.0: was 500000.0 in the run that saved" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "was 500000.0" not in capsys.readouterr().out


def test_a_model_that_does_not_iterate_has_one_row(evaluate, config_file, tmp_path, capsys):
    """The same weights as a standard decoder: what one iteration computes."""
    plain = tmp_path / "plain.toml"
    plain.write_text(config_file.read_text().replace('name = "abbie"', "").replace("iterations = 2", ""))
    checkpoint = f"--checkpoint={config_file.parent / 'a' / 'checkpoint'}"
    (one,) = evaluate("--iterations=1", TOKENS)["perplexity"]
    assert main(["eval", str(plain), checkpoint, TOKENS]) == 0
    assert f"{one['loss']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(plain), checkpoint, "--iterations=1,2"]) == 2
    assert "--iterations 1,2: model 'llama3' does not iterate; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--iterations=1,x"], "--iterations 1,x: must be whole numbers"),
        (["--iterations=0"], "--iterations 0: must be at least 1"),
        (["--tokens=0"], "--tokens 0: must be at least 1, or 0 with --tasks"),
        (["--batch-size=0"], "--batch-size 0: must be at least 1"),
        (["--limit=3"], "--limit: needs --tasks"),
        (["--checkpoint=nowhere"], "--checkpoint nowhere: no such folder"),
        (["--dump_folder=nowhere"], "no finished checkpoint in nowhere/a/checkpoint"),
        (["--corpus=nowhere"], "'nowhere': no such file"),
        (["--data.holdout_fraction=0.2"], "was 0.1 in training"),
        (["--model.dim=64"], "[264, 96], in the model [264, 64]"),
        (["--site=b"], 'no site "b"'),
        (["--iteration=2"], "--iteration: unknown key"),
    ],
)
def test_bad_input_is_one_line(refused, arguments, words):
    assert words in refused("eval", *arguments)


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt=a"], ["export", "--out=OUT"]])
def test_another_tokenizer_than_in_training_is_refused(refused, saved_run, tmp_path, command, step):
    """Whether the checkpoint has its name beside the place in the text, or the record of its run alone."""
    train_tokenizer(["a b"], 259, tmp_path)
    name, *arguments = command
    chosen = f"--step={step}" if name == "export" else f"--checkpoint={saved_run.folder}/a/checkpoint/step-{step}"
    arguments = [each.replace("OUT", str(tmp_path / "out")) for each in arguments]
    line = refused(name, chosen, f"--tokenizer={tmp_path}", *arguments)
    assert "was trained with another tokenizer (" in line and "tokenizer (its file) was byte…, is " in line


def test_tasks_without_the_harness_are_refused(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install lm-eval" in refused("eval", "--tasks=hellaswag")


@pytest.mark.parametrize("module", ["evaluate", "generate"])
def test_reading_the_command_does_not_wait_for_torch(module):
    code = f"import sys, titan_ext.commands.{module}; sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})


@pytest.mark.parametrize("word", ["validation", "test"])
def test_files_that_are_called_so_are_held_out(tmp_path, word):
    from titan_ext.config import load_site
    from titan_ext.inference.text import evaluation_text

    for name in ("train", word):
        lines = "".join(json.dumps({"text": f"{name} {number} " * 20}) + "\n" for number in range(20))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    file = tmp_path / "run.toml"
    data = f'[data]\ndataset = "{tmp_path}/*.jsonl"\nsplit = "train"\n'
    file.write_text(f'[model]\nname = "llama3"\nflavor = "tiny"\n[training]\nseq_len = 64\n{data}')
    text = evaluation_text(load_site(file), None, tokens=640, batch_size=2)
    assert 'the files of validation or test, which data.split = "train" leaves out' in text.description
    letters = bytes(token for inputs, _ in text.batches for token in inputs["input"].flatten().tolist() if token < 256)
    assert word.encode() in letters and b"train" not in letters
