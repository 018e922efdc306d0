"""Whole launches: what is printed, how they end, and that no process stays."""

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.launcher.sites import alive, end, launch, recorded, start_launch, wait_for
from titan_ext.launcher import guard
from titan_ext.launcher.processes import descendants


def ready(folder: Path, count: int):
    return lambda: len(list(folder.rglob("ready"))) == count


def test_a_good_run_shows_steps_rounds_and_equal_state(tmp_path: Path) -> None:
    code, out, err = launch(tmp_path, east="train", northwest="train")
    assert code == 0, err
    assert "east       step 2/3  loss  3.0000    1,234 tokens/s  lr 1.00e-03" in out
    assert "northwest  round 1 at step 3: 2 sites, 1.5 MB sent, 1.5 MB received, 1.00 s" in out
    assert "east           2.0000      3   3,000       1  1.5 MB    1.5 MB      1.5  aaaaaaaaaaaa" in out
    assert f"all 2 sites hold the same shared state, sha256 {'a' * 64}" in out
    assert err == ""


def test_different_state_is_a_failure(tmp_path: Path) -> None:
    code, _, err = launch(tmp_path, east="train", west="train_otherwise")
    assert code == 1
    assert err == ("titan-ext: error: the sites' shared state DIFFERS: east aaaaaaaaaaaa, west bbbbbbbbbbbb\n")


def test_files_of_an_earlier_run_count_for_nothing(tmp_path: Path) -> None:
    assert launch(tmp_path, east="train")[0] == 0
    # The second run's site leaves nothing of its own.
    code, out, err = launch(tmp_path, east="leave_children")
    assert code == 1
    assert "step" not in out.split("\n\n")[0]
    assert err == "titan-ext: error: no summary.json from east\n"


def test_a_log_without_room_ends_no_site(tmp_path: Path) -> None:
    (tmp_path / "east").mkdir()
    (tmp_path / "east" / "log.txt").symlink_to("/dev/full")
    code, out, err = launch(tmp_path, east="chatter")
    assert code == 0, err
    assert "east  step 3/3  loss  2.0000" in out


def test_what_a_log_had_no_room_for_is_counted(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "output").write_bytes(b"full\nlost\nmore\nroom\n")
    written = bytearray()

    def write(log: int, data: bytes) -> int:
        if b"lost" in data or b"more" in data:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.extend(data)
        return len(data)

    monkeypatch.setattr(guard, "_CHUNK_BYTES", 5)
    monkeypatch.setattr(guard.os, "write", write)
    with open(tmp_path / "output", "rb") as output:
        guard.pass_on(output, 1)
    assert written == b"full\n\n[10 bytes are missing here: the log could not be written]\nroom\n"


def test_a_restart_is_announced(tmp_path: Path) -> None:
    code, out, _ = launch(tmp_path, east="die_once")
    assert code == 0
    assert f"east: died with exit code 137; restart 1 of 1 in 0.05 s, log: {tmp_path}/east/log.txt" in out


def test_a_site_that_left_when_told_to_is_started_again(tmp_path: Path) -> None:
    code, out, _ = launch(tmp_path, east="leave_once")
    assert code == 0
    assert "east: left, as it was asked to; restart 1 of 1 in 0.05 s" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sites_have_time_to_save_and_are_told_once(tmp_path: Path, number: signal.Signals) -> None:
    with start_launch(tmp_path, east="leave", west="leave") as process:
        wait_for(ready(tmp_path, 4), "the sites")
        process.send_signal(number)
        out, err = end(process)
    assert process.returncode == 130
    assert "the sites save and leave … (Ctrl-C again kills them at once)" in out and err == "stopped\n"
    for site in ("east", "west"):
        assert f"{site}  left after step 7, which is saved" in out
        assert (tmp_path / site / "rank" / "told").read_text() == "1"
    assert not alive(tmp_path)


def test_a_failed_site_shows_the_end_of_its_last_attempt(tmp_path: Path) -> None:
    code, out, err = launch(tmp_path, east="die", west="stay")
    assert code == 1
    assert f"east failed with exit code 1; the end of {tmp_path}/east/log.txt:" in err
    assert "  | RuntimeError: the wheels came off\n" in err
    assert err.count("working") == 1
    assert "west  stopped" in out
    assert not alive(tmp_path)


def test_a_failed_site_shows_the_rank_that_caused_it(tmp_path: Path) -> None:
    code, _, err = launch(tmp_path, east="lose_a_rank")
    assert code == 1
    assert f"titan-ext: error: rank 1: ZeroDivisionError: no warmth; the end of {tmp_path}/east/log.txt:" in err
    assert "  | [rank1]: ZeroDivisionError: no warmth\n" in err
    assert "rank0" not in err


def test_bad_input_shows_the_line_that_says_so_and_no_more(tmp_path: Path) -> None:
    code, _, err = launch(tmp_path, east="refuse")
    assert code == 2
    assert err == "titan-ext: error: training.steps = -1: must be at least 1\nthe run failed\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    with start_launch(tmp_path, east="have_children", west="stay") as process:
        wait_for(ready(tmp_path, 4), "the sites")
        process.send_signal(number)
        out, err = end(process)
    assert process.returncode == 130
    assert "save and leave" in out and "Traceback" not in err
    assert len(recorded(tmp_path)) == 4 and not alive(tmp_path)


def test_ctrl_c_twice_stops_everything(tmp_path: Path) -> None:
    with start_launch(tmp_path, east="have_children", west="ignore_sigterm") as process:
        wait_for(ready(tmp_path, 4), "the sites")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        end(process)
    assert process.returncode == 130
    assert not alive(tmp_path)


def test_no_process_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with start_launch(tmp_path, east="have_children", west="ignore_sigterm") as process:
        wait_for(ready(tmp_path, 4), "the sites")
        process.kill()
        end(process)
    wait_for(lambda: not alive(tmp_path), "the end of every process")


def test_no_process_outlives_a_guard_that_is_killed(tmp_path: Path) -> None:
    with start_launch(tmp_path, east="have_children") as process:
        wait_for(ready(tmp_path, 3), "the site")
        os.kill(descendants(process.pid)[0], signal.SIGKILL)
        # The site is started again; what is left of the first attempt is found at the end at the latest.
        wait_for(lambda: len(recorded(tmp_path)) >= 6, "the restart")
        process.send_signal(signal.SIGTERM)
        end(process)
    assert not alive(tmp_path)
