"""Runs as they are read from what sites have written: who took part in which round, and why another did not."""

import json
import os
from pathlib import Path

import pytest

from tests.instruments.lines import append, commit, round_, step, trained
from titan_ext import cli
from titan_ext.instruments.measures import State, measure_all, standing
from titan_ext.instruments.places import LocalSites
from titan_ext.instruments.reader import RunReader
from titan_ext.instruments.run import Mark, Run

BOTH = ("east", "west")


def read(folder: Path) -> Run:
    reader = RunReader("run", [LocalSites([folder])])
    reader.refresh()
    return reader.view(lambda run: run)


def marks(run: Run, site: str) -> list[str]:
    return [cell.mark for cell in run.timeline(site).values()]


def test_a_run_without_faults(tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path, name, (1, 2, 3), BOTH)
    run = read(tmp_path)
    assert run.names == ["east", "west"] and list(run.rounds) == [1, 2, 3]
    assert marks(run, "east") == [Mark.CONTRIBUTED] * 3
    assert run.stretches("east") == [] and run.missed_in_a_row("east") == (0, "")
    east = run.sites["east"]
    assert (east.last.step, east.bytes["bytes_sent"], east.step_seconds) == (30, 3000, 1.0)
    # 2 of 10 seconds of each round.
    assert measure_all(run, east, 30.0)["stall"] == pytest.approx(0.2)


PHASE = {"kind": "phase", "phase": "waiting", "text": "rank 0 was ended by SIGKILL; restart 1 of 3", "time": 12.0}
REASONS = [
    ({"events.jsonl": [PHASE]}, PHASE["text"]),
    ({"metrics.jsonl": [{"kind": "left", "step": 11, "saved": True, "time": 12.0}]}, "left as asked after step 11"),
    ({"metrics.jsonl": [step(11, 11.0), step(12, 29.0)]}, "wrote nothing for 18 s: hung, stopped or cut off"),
    ({"metrics.jsonl": [{"kind": "start", "step": 10, "time": 15.0}]}, "its process was started"),
    (
        {"metrics.jsonl": [round_(1, 15.0, (), committed=False, error="the lighthouse is gone")]},
        "the lighthouse is gone",
    ),
    ({}, "has written nothing since"),
]


@pytest.mark.parametrize("lines, reason", REASONS, ids=[reason for _, reason in REASONS])
def test_why_a_site_missed_rounds(tmp_path: Path, lines: dict[str, list], reason: str) -> None:
    for name in BOTH:
        trained(tmp_path, name, [1], BOTH)
    trained(tmp_path, "west", (2, 3), ["west"])
    for file, records in lines.items():
        append(tmp_path / "east" / file, *records)
    run = read(tmp_path)
    assert marks(run, "east") == [Mark.CONTRIBUTED, Mark.ABSENT, Mark.ABSENT]
    (stretch,) = run.stretches("east")
    assert (stretch.first, stretch.last) == (2, 3) and reason in stretch.cell.reason
    assert run.missed_in_a_row("east")[0] == 2


def test_who_is_in_a_round_without_contributing(tmp_path: Path) -> None:
    trained(tmp_path, "west", (1, 2, 3, 4), ["west"])
    (tmp_path / "west" / "commits.jsonl").unlink()
    append(tmp_path / "west" / "commits.jsonl", *(commit(each, 10.0 * each, ["west"], BOTH) for each in (2, 3, 4)))
    east = tmp_path / "east"
    append(east / "metrics.jsonl", {"kind": "start", "step": 0, "time": 15.0}, round_(2, 20.0, ["west"], healed=True))
    append(east / "metrics.jsonl", step(21, 21.0), step(22, 22.0, loss=None), round_(3, 30.0, ["west"]))
    append(east / "metrics.jsonl", {"kind": "data_ended", "step": 33, "time": 35.0}, round_(4, 40.0, ["west"]))
    run = read(tmp_path)
    cells = list(run.timeline("east").values())
    assert [cell.mark for cell in cells] == [Mark.BEFORE, Mark.JOINED, Mark.LEFT_OUT, Mark.LEFT_OUT]
    assert "the loss of step 22 was not finite" in cells[2].reason and "data ended after step 33" in cells[3].reason


def test_a_site_of_which_only_others_tell(tmp_path: Path) -> None:
    trained(tmp_path, "west", [1], BOTH)
    trained(tmp_path, "west", [2], ["west"])
    run = read(tmp_path)
    assert run.names == ["east", "west"] and marks(run, "east") == [Mark.CONTRIBUTED, Mark.ABSENT]
    assert "its own data is not at hand" in run.stretches("east")[0].cell.reason
    assert standing(run.sites["east"], 30.0).state is State.NO_DATA
    assert measure_all(run, run.sites["east"], 30.0)["stall"] is None


def test_rounds_that_were_tried_again(tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path, name, [1], BOTH)
        append(tmp_path / name / "metrics.jsonl", round_(1, 15.0, (), committed=False, error="peer gone"))
    run = read(tmp_path)
    assert measure_all(run, run.sites["east"], 16.0)["failed_rounds"] == 1
    for name in BOTH:
        trained(tmp_path, name, [2], BOTH)
    run = read(tmp_path)
    cell = run.timeline("east")[2]
    assert cell.mark is Mark.RETRIED and cell.reason == "after an attempt that failed: peer gone"
    assert measure_all(run, run.sites["east"], 21.0)["failed_rounds"] == 0


def test_a_resumed_run_counts_no_step_twice(tmp_path: Path) -> None:
    trained(tmp_path, "east", (1, 2, 3), ["east"])
    # Back to the checkpoint of step 20; the rounds from there on are run again.
    append(tmp_path / "east" / "metrics.jsonl", *(step(each, 30.0 + each, loss=3.0) for each in range(21, 26)))
    run = read(tmp_path)
    curve = run.sites["east"].curve
    assert [each.step for each in curve.points()] == list(range(1, 26))
    assert curve.steps_repeated == 10 and curve.last.tokens == 2500 and curve.points()[20].loss == 3.0
    append(tmp_path / "east" / "metrics.jsonl", round_(3, 70.0, ["east"], bytes_sent=7))
    run = read(tmp_path)
    assert run.sites["east"].rounds[3]["bytes_sent"] == 7 and run.sites["east"].bytes["bytes_sent"] == 3007


def test_what_is_missing_is_not_zero(tmp_path: Path) -> None:
    append(tmp_path / "east" / "metrics.jsonl", {"kind": "step", "step": 1}, {"kind": "round", "round": 1})
    run = read(tmp_path)
    east = run.sites["east"]
    assert (east.last.loss, east.last.tokens, east.bytes["bytes_sent"], east.last_time) == (None, None, None, None)
    assert east.last.is_finite and marks(run, "east") == [Mark.UNKNOWN]
    measures = measure_all(run, east, 10.0)
    assert (measures["stall"], measures["loss_jump"], measures["restarts"]) == (None, None, None)
    append(tmp_path / "east" / "metrics.jsonl", step(2, 1.0, loss=None))
    run = read(tmp_path)
    assert not run.sites["east"].last.is_finite


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "4.0", [4.0], {"a": 1}, True, -5, 1.5, None])
def test_lines_of_any_kind_are_drawn_and_are_json(tmp_path: Path, value: object, capsys: pytest.CaptureFixture) -> None:
    """Whatever stands in a line, in each of its fields."""
    trained(tmp_path, "east", (1, 2), BOTH)
    lines = {
        "metrics.jsonl": [
            step(21, 21.0, tokens_per_second=1.0, lr=0.1, grad_norm=1.0),
            round_(3, 22.0, BOTH, missing={"west": "late"}),
            {"kind": "validation", "step": 21, "loss": 3.0, "time": 23.0},
            {"kind": "left", "step": 21, "saved": True, "time": 24.0},
        ],
        "commits.jsonl": [commit(3, 22.0, BOTH, BOTH)],
        "events.jsonl": [{"phase": "waiting", "text": "ended", "time": 25.0}],
    }
    for file, records in lines.items():
        append(tmp_path / "east" / file, *(each | {key: value} for each in records for key in each))
    assert cli.main(["watch", str(tmp_path), "--once"]) in (0, 1)
    capsys.readouterr()
    assert cli.main(["watch", str(tmp_path), "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0


def test_a_loss_that_is_a_nan_is_told_whoever_wrote_it(tmp_path: Path) -> None:
    trained(tmp_path, "east", (1, 2), ["east"])
    append(tmp_path / "east" / "metrics.jsonl", step(21, 21.0, loss=float("nan")))
    run = read(tmp_path)
    assert not run.sites["east"].last.is_finite
    assert measure_all(run, run.sites["east"], 22.0)["not_finite_steps"] == 1


def test_a_site_that_two_targets_have_is_told(tmp_path: Path) -> None:
    trained(tmp_path / "a", "east", (1, 2, 3), ["east"])
    trained(tmp_path / "b", "east", (1,), ["east"])
    reader = RunReader("run", [LocalSites([tmp_path / each]) for each in "ab"])
    for _ in range(2):
        reader.refresh()
        assert reader.problems == ["two targets have a site east: the first one is shown"]
        assert reader.view(lambda run: list(run.rounds)) == [1, 2, 3]


def test_diverged_sites_are_named(tmp_path: Path) -> None:
    for name in ("east", "west", "north"):
        trained(tmp_path, name, (1, 2), ("east", "west", "north"))
        digest = {"digest": "other"} if name == "west" else {}
        append(tmp_path / name / "commits.jsonl", commit(3, 30.0, BOTH, BOTH, **digest))
    assert read(tmp_path).diverged() == {"west": 3}


@pytest.mark.parametrize("how", ["replaced", "cut"])
def test_files_of_another_run_take_the_place_of_what_was_read(tmp_path: Path, how: str) -> None:
    trained(tmp_path, "east", (1, 2, 3), ["east"])
    reader = RunReader("run", [LocalSites([tmp_path])])
    reader.refresh()
    path = tmp_path / "east" / "metrics.jsonl"
    if how == "replaced":
        append(tmp_path / "new", step(1, 100.0))
        os.replace(tmp_path / "new", path)
    else:
        path.write_text(json.dumps(step(1, 100.0)) + "\n")
    (tmp_path / "east" / "commits.jsonl").unlink()
    reader.refresh()
    run = reader.view(lambda run: run)
    assert run.sites["east"].last.step == 1 and list(run.rounds) == []


def test_sites_and_files_may_come_later_and_go(tmp_path: Path) -> None:
    reader = RunReader("run", [LocalSites([tmp_path], {"east": tmp_path / "east", "west": tmp_path / "west"})])
    reader.refresh()
    assert reader.view(lambda run: run.names) == ["east", "west"]
    path = tmp_path / "east" / "metrics.jsonl"
    trained(tmp_path, "east", [1], ["east"])
    with open(path, "a") as file:
        file.write('{"kind": "step", "st')
    reader.refresh()
    assert reader.view(lambda run: run.sites["east"].last.step) == 10
    with open(path, "a") as file:
        file.write('ep": 11, "time": 11.0}\nnot JSON\n[]\n')
    reader.refresh()
    assert reader.view(lambda run: run.sites["east"].last.step) == 11
    path.unlink()
    reader.refresh()
    assert reader.view(lambda run: run.sites["east"].last.step) == 11


STATES = [
    ([], None, 11.0, State.TRAINING),
    ([], None, 16.0, State.WAITING),
    ([], None, 1000.0, State.WAITING),
    ([step(11, 11.0)], None, 100.0, State.SILENT),
    ([{"kind": "left", "step": 10, "saved": False, "time": 11.0}], None, 100.0, State.LEFT),
    ([{"kind": "start", "step": 10, "time": 12.0}], None, 20.0, State.STARTING),
    ([], "waiting", 12.0, State.RESTARTING),
    ([], "failed", 1000.0, State.FAILED),
    ([], "running", 13.0, State.STARTING),
]


@pytest.mark.parametrize("lines, phase, now, state", STATES)
def test_what_a_site_does(tmp_path: Path, lines: list, phase: str | None, now: float, state: State) -> None:
    append(tmp_path / "east" / "metrics.jsonl", *(step(each, float(each)) for each in range(1, 11)), *lines)
    (tmp_path / "east" / "config.json").write_text('{"semi_sync": {"sync_every": 10}}')
    if phase:
        append(tmp_path / "east" / "events.jsonl", {"kind": "phase", "phase": phase, "text": "", "time": 11.5})
    assert standing(read(tmp_path).sites["east"], now).state is state
    (tmp_path / "east" / "summary.json").write_text("{}")
    assert standing(read(tmp_path).sites["east"], now).state is State.FINISHED
