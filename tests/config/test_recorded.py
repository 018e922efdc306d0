"""A run's record tells whether a model computes what it did, also where no shape does."""

from pathlib import Path

import pytest

from titan_ext.config import dump_resolved, load_site, save_resolved
from titan_ext.config.recorded import changes, check_resumed
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.errors import UserError
from titan_ext.models import get_model_spec


@pytest.mark.parametrize(
    "flags, changed",
    [
        ([], []),
        (["--model.max_seq_len=4096"], []),
        (["--model.n_layers=3"], []),  # shapes tell
        (["--model.rope_theta=1e4"], [("rope_theta", 500000.0, 10000.0)]),
        (["--model.rope_scaling=none"], [("rope_scaling", "llama3", "none")]),
        (["--model.rope_scaling_factor=32"], [("rope_scaling_factor", 8.0, 32.0)]),
        (["--model.rope_original_max_positions=4096"], [("rope_original_max_positions", 8192, 4096)]),
        (["--model.norm_eps=1e-6"], [("norm_eps", 1e-5, 1e-6)]),
        (["--model.n_heads=8"], [("n_heads", 16, 8)]),
        (["--model.enable_weight_tying"], [("enable_weight_tying", False, True)]),
    ],
)
def test_what_changed_is_named(flags, changed, write):
    recorded = dump_resolved(load_site(write(), "alpha"))
    found = changes(recorded, load_site("demo.toml", "alpha", flags).config.model_spec.model)
    assert [each for each in found if each[0] != "n_kv_heads"] == changed


def test_a_record_from_before_sizes_were_recorded(write):
    """Then every model had the factor of Llama 3.1, Llama 3.2's sizes too."""
    now = get_model_spec("llama3", "1B", n_layers=1).model
    before = {"model": {"name": "llama3", "flavor": "1B", "n_layers": 1}}
    assert changes(before, now) == [("rope_scaling_factor", 8.0, 32.0)]
    assert changes(before, get_model_spec("llama3", "1B", n_layers=1, rope_scaling_factor=8.0).model) == []
    for unknown in ({}, {"model": {"name": "llama3"}}, {"model": {"name": "gone.away", "flavor": "x"}}):
        assert changes(unknown, now) == []


def test_a_run_without_checkpoints_begins_anew(write):
    site = load_site(write(), "alpha", ["--checkpoint.enable"])
    folder = Path(site.config.dump_folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model": {"name": "llama3", "flavor": "debugmodel", "rope_theta": 1e4}}')
    check_resumed(site)
    step = folder / "checkpoint" / "step-3"
    step.mkdir(parents=True)
    check_resumed(site)
    (step / ".metadata").touch()
    with pytest.raises(
        UserError, match="model.rope_theta = 500000.0: was 10000.0 in this run so far .*another dump_folder"
    ):
        check_resumed(site)
    check_resumed(load_site("demo.toml", "alpha", ["--checkpoint.enable=false"]))


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ([], True),
        (["--data.on_changed_data=continue"], False),
        (["--checkpoint.exclude_from_loading=['dataloader']"], False),
    ],
)
def test_a_run_goes_on_with_its_tokenizer(flags, refused, write, tmp_path):
    """Also where its last checkpoint is the model alone."""
    site = load_site(write(), "alpha", ["--checkpoint.enable"])
    step = Path(site.config.dump_folder) / "checkpoint" / "step-3"
    step.mkdir(parents=True)
    (step / ".metadata").touch()
    record = save_resolved(site).read_text()
    check_resumed(site)
    train_tokenizer(["a b"], 259, tmp_path)
    other = load_site("demo.toml", "alpha", ["--checkpoint.enable", f"--tokenizer={tmp_path}", *flags])
    if not refused:
        return check_resumed(other)
    with pytest.raises(UserError, match="tokenizer = .*was byte.*, is .*data.on_changed_data = 'continue'"):
        check_resumed(other)
    assert (step.parents[1] / "config.json").read_text() == record
