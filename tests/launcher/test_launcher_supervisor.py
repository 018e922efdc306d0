"""Restarts, limits and exit codes, with real processes."""

from pathlib import Path

import pytest

from tests.launcher.sites import GRACE_SECONDS, alive, job, recorded
from titan_ext.errors import UserError
from titan_ext.launcher.supervisor import INTERRUPTED, Event, Phase, Supervisor


def supervise(jobs, **options) -> tuple[int, list[Event]]:
    events: list[Event] = []
    timing = {"backoff_seconds": 0.05, "grace_seconds": GRACE_SECONDS, "poll_seconds": 0.02}
    code = Supervisor(jobs, on_event=events.append, **{**timing, **options}).run()
    return code, events


def phases(events: list[Event], name: str) -> list[Phase]:
    return [event.phase for event in events if event.job.name == name]


def test_sites_that_train_finish(tmp_path: Path) -> None:
    code, events = supervise([job(tmp_path, "east", "train"), job(tmp_path, "west", "train")])
    assert code == 0
    assert phases(events, "east") == phases(events, "west") == [Phase.RUNNING, Phase.FINISHED]


def test_a_site_that_dies_is_started_again(tmp_path: Path) -> None:
    code, events = supervise([job(tmp_path, "east", "die_once")])
    assert code == 0
    assert phases(events, "east") == [Phase.RUNNING, Phase.WAITING, Phase.RUNNING, Phase.FINISHED]
    assert events[1].code == 128 + 9
    assert (tmp_path / "east" / "log.txt").read_text().count("--- east, attempt") == 2


def test_who_knows_better_says_when_a_site_starts_again(tmp_path: Path) -> None:
    asked = {"east": 0.2}.get
    _, events = supervise([job(tmp_path, "east", "die_once"), job(tmp_path, "west", "die_once")], restart_seconds=asked)
    delays = {event.job.name: event.delay for event in events if event.phase is Phase.WAITING}
    assert delays == {"east": 0.2, "west": 0.05}


def test_restarts_are_limited_and_the_other_sites_are_stopped(tmp_path: Path) -> None:
    code, events = supervise([job(tmp_path, "east", "die"), job(tmp_path, "west", "stay")], max_restarts=2)
    assert code == 1
    assert phases(events, "east") == [Phase.RUNNING, Phase.WAITING] * 2 + [Phase.RUNNING, Phase.FAILED]
    assert phases(events, "west") == [Phase.RUNNING, Phase.STOPPED]
    assert [event.delay for event in events if event.phase is Phase.WAITING] == [0.05, 0.1]
    assert not alive(tmp_path)


def test_bad_input_is_not_tried_again(tmp_path: Path) -> None:
    code, events = supervise([job(tmp_path, "east", "refuse")])
    assert code == 2
    assert phases(events, "east") == [Phase.RUNNING, Phase.FAILED]
    assert events[-1].log.error_line() == "titan-ext: error: training.steps = -1: must be at least 1"


def test_nobody_waits_for_a_service(tmp_path: Path) -> None:
    code, events = supervise([job(tmp_path, "meeting", "stay", is_service=True), job(tmp_path, "east", "train")])
    assert code == 0
    assert phases(events, "meeting") == [Phase.RUNNING, Phase.STOPPED]
    assert not alive(tmp_path)


def test_a_service_that_ends_well_is_missed_all_the_same(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "meeting", "train", is_service=True), job(tmp_path, "east", "stay")]
    code, events = supervise(jobs, max_restarts=1)
    assert code == 1
    assert phases(events, "meeting") == [Phase.RUNNING, Phase.WAITING, Phase.RUNNING, Phase.FAILED]


def test_a_request_to_stop_ends_all_processes(tmp_path: Path) -> None:
    def requests() -> int:
        return len(list(tmp_path.glob("*/ready"))) == 2

    jobs = [job(tmp_path, "east", "have_children"), job(tmp_path, "west", "ignore_sigterm")]
    code, events = supervise(jobs, stop_requests=requests)
    assert code == INTERRUPTED
    assert phases(events, "west") == [Phase.RUNNING, Phase.STOPPED]
    assert len(recorded(tmp_path)) == 4 and not alive(tmp_path)


def test_what_a_site_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    code, _ = supervise([job(tmp_path, "east", "leave_children")])
    assert code == 0
    assert len(recorded(tmp_path)) == 2 and not alive(tmp_path)


def test_two_launches_cannot_write_to_one_folder(tmp_path: Path) -> None:
    first = Supervisor([job(tmp_path, "east", "train")])
    with pytest.raises(UserError, match="in use by another launch"):
        Supervisor([job(tmp_path, "east", "train")])
    assert first.run() == 0
    Supervisor([job(tmp_path, "east", "train")])
