"""Weights from the checkpoints that a real run left, whatever layout and format they are in."""

import shutil
from pathlib import Path

import pytest
import torch

from titan_ext.config import load_site
from titan_ext.errors import RunError, UserError
from titan_ext.inference.checkpoint import find_checkpoint
from titan_ext.inference.model import load_model
from titan_ext.semi_sync.site.ranks import SiteRanks, tensors_sha256


def weights_of(config_file: Path, step: int, weights: str = "site") -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(str(config_file.parent / "a" / "checkpoint" / f"step-{step}"), Path())
    return dict(load_model(load_site(config_file), checkpoint, weights=weights).named_parameters())


def test_the_last_one_in_hugging_face_format_is_what_the_run_ended_with(saved_run, config_file):
    digest = tensors_sha256(weights_of(config_file, 4).items(), SiteRanks(alone=True))
    assert digest == saved_run.summary()["shared_state_sha256"]


def test_the_global_copy_is_what_the_last_round_left(config_file):
    """Step 2 ends with a round, after which both are the same; step 3 moves the site's own."""
    agreed = weights_of(config_file, 2)
    for step in (2, 3):
        kept = weights_of(config_file, step, "global")
        assert kept.keys() == agreed.keys()
        assert all(torch.equal(kept[name], agreed[name]) for name in agreed)
    moved = weights_of(config_file, 3)
    assert not any(torch.equal(moved[name], agreed[name]) for name in agreed)


def test_the_latest_finished_one_is_taken(tmp_path):
    for step, content in ((9, ".metadata"), (10, "model-00001.safetensors"), (11, "__0_0.distcp"), (200, None)):
        (tmp_path / f"step-{step}").mkdir()
        if content:
            (tmp_path / f"step-{step}" / content).touch()
    found = find_checkpoint("latest", tmp_path)
    assert (found.path.name, found.step, found.huggingface) == ("step-10", 10, True)
    assert find_checkpoint(str(tmp_path), Path()) == found
    named = find_checkpoint(str(tmp_path / "step-9"), Path())
    assert (named.step, named.huggingface) == (9, False)


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint in .*checkpoint.enable = true"):
        find_checkpoint("latest", tmp_path / "none")
    with pytest.raises(UserError, match="--checkpoint nowhere: no such folder"):
        find_checkpoint("nowhere", tmp_path)
    with pytest.raises(UserError, match="must hold a checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)


@pytest.mark.parametrize("step", [3, 4], ids=["distributed", "huggingface"])
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model.n_layers=3"], r"layers\.3\.\S+, which the model has not"),
        (["--model.n_layers=5"], r"has no \S*layers\.4\.\S+, which the model has"),
        (["--model.dim=64"], r"is \[264, 96\], in the model \[264, 64\]"),
        (["--model.flavor=tiny-depth", "--model.ffn_dim=256"], "has no adapter.weight|has no Hugging Face format"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(config_file, step, flags, words):
    site = load_site(config_file, overrides=[*flags, "--checkpoint.last_save_in_hf=false"])
    checkpoint = find_checkpoint(str(config_file.parent / "a" / "checkpoint" / f"step-{step}"), Path())
    with pytest.raises(UserError, match=words):
        load_model(site, checkpoint)


def test_a_checkpoint_without_a_global_copy_is_refused(config_file):
    with pytest.raises(UserError, match="--weights global: .* holds no global parameters"):
        weights_of(config_file, 4, "global")


def test_what_a_checkpoint_that_cannot_be_read_met_with_is_said(config_file, tmp_path):
    shutil.copytree(config_file.parent / "a" / "checkpoint" / "step-3", tmp_path / "step-3")
    data = next((tmp_path / "step-3").glob("*.distcp"))
    data.unlink()
    data.mkdir()
    with pytest.raises(RunError, match="cannot be read: .*Is a directory"):
        load_model(load_site(config_file), find_checkpoint(str(tmp_path / "step-3"), Path()))


def test_a_broken_checkpoint_is_said(config_file, tmp_path):
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(RunError, match="cannot be read"):
        load_model(load_site(config_file), find_checkpoint(str(tmp_path), Path()))
