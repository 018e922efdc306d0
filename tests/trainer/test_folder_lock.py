"""Two runs never train in one folder; a run that is over, however it ended, is in nobody's way."""

import multiprocessing
import os
from pathlib import Path

import pytest

from titan_ext.errors import UserError
from titan_ext.trainer.folder_lock import in_use


def test_a_second_run_is_refused_by_the_folder(tmp_path):
    with in_use(tmp_path):
        with pytest.raises(UserError, match="another run trains in .*take another dump_folder"), in_use(tmp_path, 0.0):
            pass
    with in_use(tmp_path, 0.0):
        pass
    with pytest.raises(RuntimeError), in_use(tmp_path, 0.0):
        raise RuntimeError
    with in_use(tmp_path, 0.0):
        pass


def _leave_at_once(folder: Path) -> None:
    with in_use(folder, 0.0):
        os._exit(3)


def test_a_process_that_died_holds_nothing(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_leave_at_once, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 3
    with in_use(tmp_path, 0.0):
        pass
