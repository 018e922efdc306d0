"""What eval, generate, export and personalize read of a bucket is what they read of a folder."""

from pathlib import Path

import pytest
import torch

from tests.object_store import S3
from titan_ext.cli import main
from titan_ext.config import load_site
from titan_ext.errors import ReadError, UserError
from titan_ext.export.trained import site_checkpoint, trained_model
from titan_ext.inference.checkpoint import Checkpoint, find_checkpoint
from titan_ext.inference.model import load_model
from titan_ext.object_store import file_system

STORE = "s3://bucket/run"


@pytest.fixture
def stored(config_file: Path, s3: S3) -> str:
    """The checkpoints of steps 1 to 3 and the record of the run, in a bucket."""
    files, folder = file_system(STORE), config_file.parent / "a"
    for path in [
        folder / "config.json",
        *folder.glob("checkpoint/step-[123]/*"),
        *folder.glob("*/step-[123]/.metadata"),
    ]:
        files.pipe_file(f"{STORE}/a/{path.relative_to(folder)}", path.read_bytes())
    return f"{STORE}/a/checkpoint"


@pytest.mark.parametrize("weights", ["site", "global"])
def test_the_weights_are_those_of_the_folder(weights, stored, config_file):
    site, folder = load_site(config_file), config_file.parent / "a" / "checkpoint" / "step-3"
    found = find_checkpoint(stored, "")
    assert found == Checkpoint(f"{stored}/step-3", huggingface=False) and found.step == 3
    assert find_checkpoint("latest", stored) == find_checkpoint(f"{stored}/step-3/", "") == found
    theirs = dict(load_model(site, found, weights=weights).named_parameters())
    for name, value in load_model(site, find_checkpoint(str(folder), ""), weights=weights).named_parameters():
        assert torch.equal(theirs[name], value)
    assert found.trained_with() == find_checkpoint(str(folder), "").trained_with() != None  # noqa: E711
    found.check_tokenizer(site.config)


def test_eval_finds_the_latest_of_the_sites_part(stored, evaluate):
    flags = ["--tokens", "256", "--checkpoint.last_save_in_hf=false"]
    there = evaluate(f"--checkpoint.folder={STORE}", *flags)
    named = evaluate("--checkpoint", f"{stored}/step-3", *flags)
    assert there["checkpoint"] == named["checkpoint"] == f"{stored}/step-3"
    assert there["perplexity"][0]["loss"] == named["perplexity"][0]["loss"]


def test_a_text_is_continued_as_from_the_folder(stored, config_file, capsys):
    asked = ["generate", str(config_file), f"--dump_folder={config_file.parent}", "--prompt=def", "--max-tokens=12"]
    folder, texts = config_file.parent / "a" / "checkpoint" / "step-3", []
    latest = [f"--checkpoint.folder={STORE}", "--checkpoint.last_save_in_hf=false"]
    memory = "memory://generate/step-3"
    for path in folder.iterdir():
        file_system(memory).pipe_file(f"{memory}/{path.name}", path.read_bytes())
    for place in ([f"--checkpoint={folder}"], latest, ["--checkpoint", f"{stored}/step-3/"], ["--checkpoint", memory]):
        assert main([*asked, *place]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def") and set(texts) == {texts[0]}


@pytest.mark.parametrize("command", ["generate", "personalize"])
def test_a_store_that_is_away_ends_the_command_in_one_line(command, stored, config_file, s3: S3, capsys):
    flags = {"generate": ["--prompt=x"], "personalize": [f"--out={config_file.parent / 'adapted'}"]}[command]
    s3.cut()
    assert main([command, str(config_file), f"--dump_folder={config_file.parent}", *flags, "--checkpoint", stored]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert stored in line and "the server cannot be reached" in line


@pytest.mark.parametrize(("step", "taken"), [(None, 3), (2, 2)])
def test_export_finds_a_step_of_the_sites_part(step, taken, stored, config_file):
    site = load_site(config_file, "a", [f"--checkpoint.folder={STORE}", "--checkpoint.last_save_in_hf=false"])
    assert site_checkpoint(site, step).path == f"{stored}/step-{taken}"
    assert trained_model(site, step) is not None
    with pytest.raises(UserError, match=f'site "a": no finished checkpoint in {stored}/step-7'):
        site_checkpoint(site, 7)


@pytest.mark.parametrize("asked", [f"{STORE}/b/checkpoint", "latest"])
def test_where_there_is_none_it_is_said(asked, stored):
    with pytest.raises(UserError, match=f"--checkpoint {asked}: (must hold|no finished checkpoint in {STORE}/b)"):
        find_checkpoint(asked, f"{STORE}/b/checkpoint")


def test_a_store_that_is_away_is_said_in_one_line(stored, s3: S3):
    s3.cut()
    with pytest.raises(ReadError, match="the server cannot be reached"):
        find_checkpoint(stored, "")
