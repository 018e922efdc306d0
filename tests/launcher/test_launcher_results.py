"""Following metrics that are being written."""

import json
import os
from pathlib import Path

from titan_ext.launcher.results import JsonLinesFollower


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def steps(follower: JsonLinesFollower) -> list[int]:
    return [record["step"] for record in follower.poll()]


def test_a_file_that_appears_later(tmp_path: Path) -> None:
    follower = JsonLinesFollower(tmp_path / "metrics.jsonl")
    assert follower.poll() == []
    append(tmp_path / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n')
    assert steps(follower) == [1, 2]
    assert follower.poll() == []


def test_lines_of_an_earlier_run_are_passed_over(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", '{"step": 1}\n')
    follower = JsonLinesFollower(tmp_path / "metrics.jsonl")
    append(tmp_path / "metrics.jsonl", '{"step": 2}\n')
    assert steps(follower) == [2]


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = JsonLinesFollower(path)
    line = json.dumps({"step": 1, "note": "grüße"}, ensure_ascii=False) + "\n"
    encoded = line.encode()
    for cut in range(len(encoded)):
        with open(path, "ab") as file:
            file.write(encoded[cut : cut + 1])
        found = follower.poll()
        assert (found == []) is (cut < len(encoded) - 1)
    assert found == [{"step": 1, "note": "grüße"}]


def test_lines_that_are_not_json_objects_are_dropped(tmp_path: Path) -> None:
    follower = JsonLinesFollower(tmp_path / "metrics.jsonl")
    # Half a line of a killed process, with the next one's first line behind it.
    append(tmp_path / "metrics.jsonl", '{"step": 1, "lo{"step": 1}\n7\n\n{"step": 2}\n')
    assert steps(follower) == [2]


def test_a_file_that_is_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n{"step": 2}\n')
    follower = JsonLinesFollower(path)
    path.write_text('{"step": 7}\n')
    assert steps(follower) == [7]


def test_a_file_that_is_replaced_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n')
    follower = JsonLinesFollower(path)
    append(tmp_path / "new", '{"step": 7}\n{"step": 8}\n')
    os.replace(tmp_path / "new", path)
    assert steps(follower) == [7, 8]


def test_a_file_that_goes_away_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n')
    follower = JsonLinesFollower(path)
    path.unlink()
    assert follower.poll() == []
