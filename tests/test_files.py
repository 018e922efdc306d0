"""Files stay whole on a disk that fills."""

import os
from pathlib import Path

import pytest

from tests.small_disk import room_for
from titan_ext.error_text import path_error
from titan_ext.errors import RunError
from titan_ext.files import append_line, write_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with room_for(100), pytest.raises(OSError) as raised:
        write_whole(path, "x" * 1000)
    assert raised.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "to.txt").touch()
    (tmp_path / "link.txt").symlink_to("to.txt")
    write_whole(tmp_path / "link.txt", "text")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "to.txt").read_text() == "text"
    source, sink = os.pipe()
    write_whole(f"/dev/fd/{sink}", "text")
    os.close(sink)
    assert os.read(source, 100) == b"text"
    os.close(source)


def test_a_line_cut_short_by_a_full_disk_does_not_harm_the_next(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines"
    append_line(path, "first", sync=True)
    with room_for(10), pytest.raises(OSError) as raised:
        append_line(path, "second")
    assert raised.value.filename == str(path)
    append_line(path, "third")
    assert path.read_text().splitlines() == ["first", "seco", "third"]


def test_the_last_word_on_a_full_disk_names_file_and_cure(tmp_path: Path) -> None:
    with room_for(10), pytest.raises(OSError) as raised:
        write_whole(tmp_path / "a.txt", "x" * 1000)
    error = path_error(raised.value)
    assert isinstance(error, RunError)
    assert (
        str(error)
        == f"{tmp_path}/a.txt: cannot be written: File too large; make room on its disk, or name another place"
    )
