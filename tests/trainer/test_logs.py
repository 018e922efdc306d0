"""A disk that takes no more costs lines of a log, and neither the run nor the lines that come after."""

import json
import logging
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import LoggerContainer, TensorBoardLogger

from tests.small_disk import room_for
from titan_ext.trainer.journal import RunJournal
from titan_ext.trainer.loggers import keep_going


def test_lines_that_found_no_room_are_counted(tmp_path: Path, caplog) -> None:
    journal = RunJournal(str(tmp_path), enabled=True)
    journal.add("step", {"step": 1})
    with room_for((tmp_path / "metrics.jsonl").stat().st_size), caplog.at_level(logging.ERROR):
        journal.add("step", {"step": 2})
        journal.add("step", {"step": 3})
    journal.add("step", {"step": 4})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [1, None, 4]
    assert lines[1]["text"] == "2 lines are missing here: the file could not be written"
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/metrics.jsonl: cannot be written: File too large; training goes on"
    ]


def test_a_folder_that_is_removed_is_made_anew_and_that_is_said(tmp_path: Path) -> None:
    journal = RunJournal(str(tmp_path / "site"), enabled=True)
    journal.add("step", {"step": 1})
    (tmp_path / "site").rename(tmp_path / "moved")
    journal.add("step", {"step": 2})
    note, line = [json.loads(line) for line in (tmp_path / "site" / "metrics.jsonl").read_text().splitlines()]
    assert "was moved or removed while the site trains" in note["text"] and line["step"] == 2


def test_tensorboard_without_room_is_left_alone(tmp_path: Path, caplog) -> None:
    loggers = LoggerContainer()
    for name in ("a", "b"):
        loggers.add_logger(TensorBoardLogger(str(tmp_path / name)))
    keep_going(loggers)
    writers: list[SummaryWriter] = [each._wrapped.writer for each in loggers._loggers]
    with caplog.at_level(logging.ERROR):
        loggers.log({"loss": 1.0}, 1)
        writers[0].flush()
        broken = writers[0]._get_file_writer().event_writer._async_writer._worker
        broken.exception = OSError(28, "No space left on device")  # as its thread leaves it
        loggers.log({"loss": 2.0}, 2)
        loggers.log({"loss": 3.0}, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoardLogger cannot write: No space left on device: step 2 on is missing there; training goes on"
    ]
    loggers.close()
    assert all(each._wrapped is None for each in loggers._loggers[:1])
