"""Alerts: rules as data, and when they hold."""

from pathlib import Path

import pytest

from tests.instruments.lines import append, commit, round_, step, trained
from tests.instruments.test_run import BOTH, read
from titan_ext.errors import UserError
from titan_ext.instruments.alerts import load_rules, raised
from titan_ext.instruments.snapshot import snapshot

NOW = 31.0


def names(folder: Path, now: float = NOW, file: Path | None = None) -> set[tuple[str, str]]:
    return {(each.rule, each.site) for each in raised(read(folder), load_rules(file), now)}


def test_a_run_without_faults_raises_none(tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path, name, (1, 2, 3), BOTH)
    assert names(tmp_path) <= {("disk", "east"), ("disk", "west")}


def fault(folder: Path, kind: str) -> None:
    """Something goes wrong at the east."""
    east = folder / "east"
    metrics = east / "metrics.jsonl"
    if kind == "missing":
        trained(folder, "west", (4, 5, 6), ["west"])
    elif kind == "loss spike":
        append(metrics, *(step(each, float(each), loss=7.0) for each in range(31, 37)))
    elif kind == "loss not finite":
        append(metrics, step(31, 31.0, loss=None))
    elif kind == "diverged":
        for name, digest in (("east", "other"), ("west", "same"), ("north", "same")):
            append(folder / name / "commits.jsonl", commit(4, 40.0, BOTH, BOTH, digest=digest))
    elif kind == "rounds fail":
        append(metrics, *(round_(3, 31.0, (), committed=False, error="no peer") for _ in range(2)))
    elif kind == "stall":
        append(metrics, round_(4, 40.0, BOTH, seconds_quorum=9.0))
    elif kind in ("failed", "restarts"):
        phases = ["failed"] if kind == "failed" else ["waiting", "waiting"]
        append(east / "events.jsonl", *({"kind": "phase", "phase": each, "text": "x", "time": 31.0} for each in phases))


KINDS = ["missing", "loss spike", "loss not finite", "diverged", "rounds fail", "stall", "failed", "restarts"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_wrong_at_a_site_is_told_of_it(tmp_path: Path, kind: str) -> None:
    for name in BOTH:
        trained(tmp_path, name, (1, 2, 3), BOTH)
    fault(tmp_path, kind)
    found = names(tmp_path, 41.0)
    assert (kind, "east") in found and (kind, "west") not in found


def test_silence_is_told_while_a_run_goes_on_and_not_after_it(tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path, name, (1, 2, 3), BOTH)
    (tmp_path / "west" / "summary.json").write_text("{}")
    found = {each for each in names(tmp_path, 1000.0) if each[0] == "silent"}
    assert found == {("silent", "east")}


def test_a_site_that_is_started_again_is_told_with_the_reason(tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path, name, (1, 2, 3), BOTH)
    text = "rank 0 was ended by SIGKILL; restart 1 of 3"
    for phase, time in (("waiting", 31.0), ("running", 32.0)):
        line = {"kind": "phase", "phase": phase, "text": text if phase == "waiting" else "starting", "time": time}
        append(tmp_path / "east" / "events.jsonl", line)
        (alert,) = [each for each in raised(read(tmp_path), load_rules(), time + 1) if each.rule == "coming back"]
        assert alert.site == "east" and text in alert.text
    append(tmp_path / "east" / "metrics.jsonl", step(31, 40.0))
    assert "coming back" not in {rule for rule, _ in names(tmp_path, 41.0)}


def test_a_site_that_waits_for_long_is_told_of(tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path, name, (1, 2, 3), BOTH)
        (tmp_path / name / "config.json").write_text('{"semi_sync": {"sync_every": 10}}')
    append(tmp_path / "west" / "metrics.jsonl", step(31, 31.0))
    found = names(tmp_path, 100.0)
    assert ("waits", "east") in found and ("waits", "west") not in found and ("silent", "west") in found


def test_what_several_sites_have_is_told_once_and_what_differs_apart(tmp_path: Path) -> None:
    for name, loss in (("a", 8.0), ("b", 9.0), ("c", 4.0)):
        trained(tmp_path, name, (1, 2, 3), ("a", "b", "c"))
        append(tmp_path / name / "metrics.jsonl", *(step(each, float(each), loss=loss) for each in range(31, 37)))
    told = snapshot(read(tmp_path), load_rules(), 37.0)["told"]
    assert [(each["site"], each["text"]) for each in told if each["rule"] == "loss spike"] == [
        ("a, b", "its loss has risen to 2.00 times what it was")
    ]
    for name in ("a", "b"):
        line = {"kind": "phase", "phase": "failed", "text": f"no room at {name}", "time": 40.0}
        append(tmp_path / name / "events.jsonl", line)
    told = snapshot(read(tmp_path), load_rules(), 41.0)["told"]
    assert [each["site"] for each in told if each["rule"] == "failed"] == ["a", "b"]


def test_a_file_changes_drops_and_adds_rules(tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path / "run", name, (1, 2, 3), BOTH)
    file = tmp_path / "alerts.toml"
    file.write_text("""
[[alert]]
name = "stall"
measure = "stall"
above = 0.1
severity = "critical"
[[alert]]
name = "silent"
off = true
[[alert]]
name = "few lines"
measure = "silence_seconds"
above = 0.5
text = "{value:.0f} s"
""")
    alerts = {
        each.rule: each for each in raised(read(tmp_path / "run"), load_rules(file), 1000.0) if each.site == "east"
    }
    assert alerts["stall"].severity == "critical" and alerts["few lines"].text == "970 s" and "silent" not in alerts


WRONG = [
    ('[[alert]]\nname = "stall"\nabove = 1', "alert stall: must have a measure"),
    ('[[alert]]\nname = "a"\nmeasure = "x"\nabove = 1', "there is no such measure; there are loss_jump"),
    ('[[alert]]\nname = "stal"\noff = true', "did you mean 'stall'?"),
    ('[[alert]]\nname = "stall"\noff = true\n' * 2, "alert stall: is there 2 times"),
    ("[alert", "alerts.toml"),
    ("x = 1", "holds x"),
    ('[[alert]]\nmeasure = "stall"\nabove = 1', "must have a name"),
    ('[[alert]]\nname = "a"\nmeasure = "stal"\nabove = 1', "did you mean stall?"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"', "must have one of above, below, at_least"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabove = 1\nbelow = 2', "must have one of"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabove = "1"', "above = '1': must be a number"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabove = true', "must be a number"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabove = nan', "above = nan: must be a number"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabov = 1', "did you mean above?"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabove = 1\nseverity = "bad"', "critical, warning"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabove = 1\ntext = "{site}"', "only {value} and {reason}"),
    ('[[alert]]\nname = "a"\nmeasure = "stall"\nabove = 1\ntext = "{"', "only {value} and {reason}"),
    ("alert = 1", "must be [[alert]] tables"),
    ("alert = [1]", "must be a table"),
]


@pytest.mark.parametrize("text, problem", WRONG)
def test_rules_that_are_none_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "alerts.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_rules(file)
    assert problem in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_rules(tmp_path / "absent.toml")
