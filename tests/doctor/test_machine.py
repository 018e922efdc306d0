"""Checks of this machine that need no other site."""

import pytest

from titan_ext.doctor import machine
from titan_ext.doctor.finding import Level


@pytest.mark.parametrize(
    ("control", "restarts", "seconds", "level"),
    [
        ("cubic", 1, 0.08, Level.NOTE),
        ("cubic", 0, 0.08, Level.OK),
        ("bbr", 1, 0.08, Level.OK),
        ("cubic", 1, 0.0005, None),
        ("cubic", 1, None, None),
    ],
)
def test_that_far_connections_begin_anew_is_said_with_its_cure(
    monkeypatch, tmp_path, control, restarts, seconds, level
):
    (tmp_path / "tcp_slow_start_after_idle").write_text(f"{restarts}\n")
    (tmp_path / "tcp_congestion_control").write_text(f"{control}\n")
    monkeypatch.setattr(machine, "_KERNEL", tmp_path)
    found = machine.check_pauses(seconds)
    assert [each.level for each in found] == ([] if level is None else [level])
    if level is Level.NOTE:
        assert "80 ms" in found[0].why and "tcp_slow_start_after_idle=0" in found[0].mend
