"""One run taken up in many ways: each goes on and says what is not as it was, or is refused in a line."""

import json
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests.end_to_end.forked import start_ranks
from tests.end_to_end.resumed_files import Case, resume_in_ways
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_runs import own_data

pytestmark = pytest.mark.timeout(900)  # the first test waits for all ways

_NO_LIGHTHOUSE = "http://127.0.0.1:1"
_FIRST = ["--semi_sync.method=none", "--checkpoint.enable", "--checkpoint.interval=1", "--training.steps=2"]
_FIRST += ["--training.seq_len=16", "--training.local_batch_size=1", "--lr_scheduler.total_steps=9"]
_ON = "--training.steps=3"


def _remove_metadata(folder: Path) -> None:
    for path in folder.glob("checkpoint/step-*/.metadata"):
        path.unlink()


def _remove_record(folder: Path) -> None:
    (folder / "config.json").unlink()


def _cut_record(folder: Path) -> None:
    record = folder / "config.json"
    record.write_text(record.read_text()[:300])


def _cut(folder: Path) -> None:
    shard = folder / "checkpoint" / "step-2" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    """A bit of the largest tensor in the last checkpoint."""
    shard = folder / "checkpoint" / "step-2" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    stored = FileSystemReader(shard.parent).read_metadata().storage_data.values()
    largest = max(stored, key=lambda part: part.length)
    data[largest.offset + largest.length // 2] ^= 1
    shard.write_bytes(data)


CASES = {
    "same": Case((_ON,)),
    "tied": Case((_ON, "--model.enable_weight_tying")),
    "schedule": Case((_ON, "--lr_scheduler.decay_type=cosine", "--lr_scheduler.total_steps=20")),
    "steps": Case((_ON, "--lr_scheduler.total_steps=none")),
    "optimizer": Case((_ON, "--optimizer.name=SGD", "--optimizer.implementation=foreach")),
    "batch": Case((_ON, "--training.local_batch_size=2", "--training.seq_len=32")),
    "precision": Case((_ON, "--training.dtype=bfloat16", "--training.max_norm=0.5", "--loss.z_loss=0.1")),
    "no checkpoints": Case((_ON, "--checkpoint.enable=false")),
    "another folder": Case((_ON, "--checkpoint.folder=elsewhere")),
    "a step that is not there": Case((_ON, "--checkpoint.load_step=9")),
    "copied without hidden files": Case((_ON,), _remove_metadata),
    "cut": Case((_ON,), _cut),
    "flipped": Case((_ON,), _flip),
    "flipped, by name": Case((_ON, "--checkpoint.load_step=2"), _flip),
    "record cut": Case((_ON,), _cut_record),
    "another model": Case((_ON, "--model.name=abbie")),
    "nothing left": Case(("--training.steps=1",)),
    "two beginnings": Case((_ON, "--checkpoint.initial_load_path={folder}/first/a/checkpoint/step-1")),
    "record lost": Case((_ON, "--model.rope_theta=1e4"), _remove_record),
}
NOTES = {
    "same": [],
    "schedule": ["lr_scheduler.total_steps was 9, is 20", 'lr_scheduler.decay_type was "linear", is "cosine"'],
    "steps": ["training.steps was 2, is 3 (the end of the learning rate's schedule)"],
    "optimizer": ['optimizer.param_groups[0].optimizer_name was "AdamW", is "SGD"'],
    "batch": ["training.seq_len was 16, is 32", "training.global_batch_size was 1, is 2"],
    "precision": [
        'training.dtype was "float32", is "bfloat16"',
        "training.max_norm was 1.0, is 0.5",
        "loss.z_loss was not set, is 0.1",
    ],
    "no checkpoints": ["does not go on from the checkpoints in", "step-2: checkpoint.enable is false"],
    "another folder": ["does not go on from the checkpoints in", "checkpoint.folder is another"],
    "cut": [],
    "flipped": [],
    "nothing left": ["nothing is left to train: step 2 is taken, training.steps is 1"],
    "two beginnings": ["checkpoint.initial_load_path is not read: this run goes on from its own"],
    "record lost": ["model.rope_theta was not set, is 10000.0"],
}
REFUSED = {
    "record cut": "config.json: the run's record is damaged",
    "another model": 'model.name = "abbie": was "llama3" in this run so far',
    "flipped, by name": "step-2: __0_0.distcp is damaged (checksum, at byte",
    "tied": "model.enable_weight_tying = true: was false in this run so far",
    "a step that is not there": "checkpoint.load_step=9 not found",
    "copied without hidden files": "and 1 more have no file .metadata, which is written last: restore it, or remove",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, text_corpus):
    folder = tmp_path_factory.mktemp("resumed")
    config = write_config(folder, ["a"], own_data(text_corpus, 1), {})
    site = start_ranks(config, "a", 1, _NO_LIGHTHOUSE, resume_in_ways, config, _FIRST, CASES, folder)
    assert site.wait(800) == [0], site.log()[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", NOTES)
def test_what_is_not_as_it_was_is_said(case, found):
    notes = " / ".join(found[case]["notes"])
    assert found[case]["error"] == ""
    assert all(each in notes for each in NOTES[case]) and bool(notes) == bool(NOTES[case]), notes
    steps = {
        "no checkpoints": ["1", "2", "3"],
        "another folder": ["1", "2", "3"],
        "cut": ["2", "3"],
        "flipped": ["2", "3"],
        "nothing left": [],
    }
    assert list(found[case]["losses"]) == steps.get(case, ["3"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_gone_on_from_is_refused(case, found):
    assert found[case]["error"].partition(":")[0] in ("UserError", "SettingError")
    assert REFUSED[case] in found[case]["error"]
    assert found[case]["losses"] == {}


def test_damage_costs_a_step_and_no_more(found):
    for case in ("cut", "flipped"):
        assert found[case]["losses"]["3"] == found["same"]["losses"]["3"], case
