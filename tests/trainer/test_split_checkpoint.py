"""Parts of checkpoints that lie on several disks."""

from pathlib import Path

import pytest

from titan_ext.trainer import split_checkpoint
from titan_ext.trainer.disks import Disks, _file_system


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [([], []), ([5], [[5]]), ([4, 4, 4], [[4, 4], [4]]), ([20, 1, 9], [[20], [1, 9]]), ([6, 7], [[6], [7]])],
)
def test_what_is_sent_at_once_is_limited(sizes, chunks, monkeypatch):
    monkeypatch.setattr(split_checkpoint, "_CHUNK_BYTES", 10)
    stretches = [("file", place, size) for place, size in enumerate(sizes)]
    sent = list(split_checkpoint._chunks(stretches))
    assert [[size for *_, size in chunk] for chunk in sent] == chunks
    assert [each for chunk in sent for each in chunk] == stretches


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "here").write_bytes(b"0123456789")
    assert split_checkpoint._read(tmp_path, [("here", 2, 3)]) == {("here", 2, 3): b"234"}
    assert (
        split_checkpoint._read(tmp_path, [("gone", 0, 1)])
        == f"{tmp_path}/gone cannot be read: No such file or directory"
    )


@pytest.mark.parametrize(
    ("first_ranks", "one", "keeping"),
    [((0, 0, 0, 0), True, [0]), ((0, 0, 2, 2), False, [0, 2]), ((0, 1, 2, 3), False, [0, 1, 2, 3])],
)
def test_each_disk_is_kept_in_order_by_its_first_rank(first_ranks, one, keeping):
    disks = Disks(first_ranks)
    assert disks.are_one is one
    assert [rank for rank in range(4) if disks.keeps_order(rank)] == keeping


def test_the_kind_of_a_file_system_is_that_of_the_innermost_mount():
    assert _file_system(Path("/proc/self")) == "proc"
