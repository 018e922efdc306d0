"""A site's part of an object store, in memory: who has it, which checkpoints are old, and what becomes of logs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_ext.checkpoint_place import checkpoint_folder, files_below, read_text
from titan_ext.object_store import file_system
from titan_ext.trainer import log_mirror
from titan_ext.trainer.log_mirror import fetch_logs, mirror_logs
from titan_ext.trainer.ownership import Ownership, TakenOver
from titan_ext.trainer.site_store import SiteStore
from titan_ext.trainer.store_ranks import StoreRanks
from titan_ext.trainer.whole_checkpoints import latest_whole

STORE = "memory://bucket/run"
PART = f"{STORE}/east"


@pytest.fixture(autouse=True)
def empty() -> None:
    files = file_system(STORE)
    if files.exists(STORE):
        files.rm(STORE, recursive=True)


def config(folder: Path) -> Any:
    checkpoint = SimpleNamespace(folder=STORE, retry_seconds=0, enable=True)
    return SimpleNamespace(dump_folder=str(folder), checkpoint=checkpoint)


def test_each_site_has_a_part_of_its_own():
    assert checkpoint_folder("runs/demo/east", f"{STORE}/") == f"{PART}/checkpoint"
    assert checkpoint_folder("runs/demo/east", "checkpoint") == "runs/demo/east/checkpoint"


def test_the_run_that_begins_last_has_the_place(tmp_path):
    files = file_system(STORE)
    first, second = (Ownership(PART, str(tmp_path / name)) for name in ("first", "second"))
    assert first.take(files) is None
    first.check(files)
    assert str(tmp_path / "first") in second.take(files)
    second.check(files)
    with pytest.raises(TakenOver, match=f"{tmp_path / 'second'} on .* has begun here"):
        first.check(files)


def test_a_run_that_is_started_again_says_nothing(tmp_path):
    files = file_system(STORE)
    Ownership(PART, str(tmp_path)).take(files)
    assert Ownership(PART, str(tmp_path)).take(files) is None


def test_one_that_was_never_taken_is_taken_at_the_first_save(tmp_path):
    """As a seed checkpoint's, which loads nothing."""
    files = file_system(STORE)
    Ownership(PART, str(tmp_path / "earlier")).take(files)
    Ownership(PART, str(tmp_path / "seed")).check(files)
    assert json.loads(read_text(f"{PART}/owner.json"))["folder"] == str(tmp_path / "seed")


@pytest.mark.parametrize(
    ("whole", "cut_short", "last", "old"),
    [
        ([2, 4, 6, 8], [], 8, [2, 4]),
        ([2, 8], [4, 6], 8, [4, 6]),
        ([2, 4, 6], [8], 8, [2]),
        ([], [2, 4], 4, []),
        ([10, 9], [], 10, []),
        ([2, 6, 8], [4], 4, [2]),  # a run that went back writes its step 4 at this moment
    ],
)
def test_what_is_old_are_those_before_the_latest_and_what_failed_saves_left(whole, cut_short, last, old, tmp_path):
    for step in (*whole, *cut_short):
        file_system(STORE).pipe_file(f"{PART}/checkpoint/step-{step}/__0_0.distcp", b"data")
    for step in whole:
        file_system(STORE).pipe_file(f"{PART}/checkpoint/step-{step}/.metadata", b"data")
    store = SiteStore(f"{PART}/checkpoint", str(tmp_path), StoreRanks(0))
    assert store.old(2, last) == [f"{PART}/checkpoint/step-{step}" for step in old]


def test_a_save_replaces_what_is_there_whole(tmp_path):
    store = SiteStore(f"{PART}/checkpoint", str(tmp_path), StoreRanks(0))
    checkpoint = f"{PART}/checkpoint/step-1"
    file_system(STORE).pipe_file(f"{checkpoint}/__7_0.distcp", b"of more ranks")
    store.save(checkpoint, lambda: dcp.save({"x": torch.ones(2)}, checkpoint_id=checkpoint, no_dist=True))
    assert sorted(files_below(checkpoint)) == [".metadata", "__0_0.distcp"]
    sizes = {path: SimpleNamespace(size=size) for path, size in files_below(f"{PART}/checkpoint").items()}
    assert latest_whole(f"{PART}/checkpoint", sizes, {}) == 1
    sizes["step-1/__0_0.distcp"].size -= 1
    with pytest.raises(ValueError, match="is damaged and no other is whole"):
        latest_whole(f"{PART}/checkpoint", sizes, {})


def test_logs_follow_the_site_to_another_disk_and_the_longer_one_stays(tmp_path):
    first, second = tmp_path / "one" / "east", tmp_path / "two" / "east"
    for folder in (first, second):
        folder.mkdir(parents=True)
    (first / "metrics.jsonl").write_text("1\n2\n")
    (first / "commits.jsonl").write_text("1\n")
    mirror_logs(str(first), PART, ["metrics.jsonl", "commits.jsonl", "summary.json"])
    assert sorted(files_below(PART)) == ["commits.jsonl", "metrics.jsonl"]
    assert fetch_logs(config(second)) == [f"{PART}/commits.jsonl", f"{PART}/metrics.jsonl"]
    assert (second / "metrics.jsonl").read_text() == "1\n2\n"
    (second / "metrics.jsonl").write_text("1\n2\n3\n")
    assert fetch_logs(config(second)) == []
    assert (second / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_of_a_long_log_the_last_lines_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(log_mirror, "_MOST_BYTES", 10)
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\nthree\nfour\n")
    mirror_logs(str(tmp_path), PART, ["metrics.jsonl"])
    assert read_text(f"{PART}/metrics.jsonl") == "four\n"
