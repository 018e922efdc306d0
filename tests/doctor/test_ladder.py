"""The ladder of timeouts, from settings and what was measured."""

from typing import Any

import pytest

from titan_ext.doctor.finding import Level
from titan_ext.doctor.ladder import Timing, check_ladder
from titan_ext.replica import ReplicaConfig

MIB = 2**20
SOUND = dict(bucket_bytes=32 * MIB, round_bytes=64e6, round_steps=100, step_seconds=0.5, bits_per_second=1e9)


def found(config: dict[str, Any], timing: dict[str, Any]) -> dict[str, tuple[Level, str]]:
    findings = check_ladder(ReplicaConfig(**config), Timing(**SOUND | timing))
    assert all(bool(each.mend) == bool(each.why) == (each.level is not Level.OK) for each in findings)
    return {each.check: (each.level, each.mend) for each in findings}


def test_what_is_sound_is_one_line() -> None:
    assert found({}, {}) == {"timeouts": (Level.OK, "")}
    assert found({}, dict.fromkeys(("round_bytes", "round_steps", "step_seconds", "bits_per_second"))) == {
        "timeouts": (Level.OK, "")
    }


CASES = [
    # 3 beats of 2 s.
    (dict(heartbeat_interval_seconds=2.0), {}, "heartbeats", Level.WARNING, "heartbeat_timeout_seconds = 10"),
    ({}, dict(round_trip_seconds=3.0), "heartbeats", Level.WARNING, "heartbeat_timeout_seconds = 10"),
    (dict(quorum_timeout_seconds=4.0), {}, "timeouts", Level.PROBLEM, "quorum_timeout_seconds = 20"),
    (dict(timeout_seconds=5.0), {}, "timeouts", Level.PROBLEM, "timeout_seconds = 20"),
    # 32 MiB at 1 Mbit/s: 268 s; twice that has to fit.
    (dict(timeout_seconds=400.0), dict(bits_per_second=1e6), "bucket", Level.WARNING, "timeout_seconds = 2000"),
    (dict(timeout_seconds=200.0), dict(bits_per_second=1e6), "bucket", Level.PROBLEM, "timeout_seconds = 2000"),
    # 100 steps of 30 s: 3000 s.
    ({}, dict(step_seconds=30.0), "round", Level.PROBLEM, "join_timeout_seconds = 20000"),
    # 64 MB at 20 Mbit/s: 25.6 s for 50 s of inner steps; 205 steps would bring it down to a fifth.
    ({}, dict(bits_per_second=20e6), "utilisation", Level.WARNING, "sync_every = 300"),
]


@pytest.mark.parametrize("config, timing, check, level, mend", CASES)
def test_what_is_not_is_told_with_what_mends_it(
    config: dict, timing: dict, check: str, level: Level, mend: str
) -> None:
    findings = found(config, timing)
    assert findings[check][0] is level and mend in findings[check][1]


def test_an_exchange_beside_inner_steps_costs_only_what_is_left_of_it() -> None:
    assert "utilisation" not in found({}, dict(bits_per_second=20e6, overlaps=True))
    assert "utilisation" in found({}, dict(bits_per_second=5e6, overlaps=True))


@pytest.mark.parametrize("config", [{"heartbeat_interval_seconds": 2.0}, {"quorum_timeout_seconds": 4.0}])
def test_what_mends_it_does(config: dict[str, float]) -> None:
    unknown = {"step_seconds": None}
    ((_, mend),) = found(config, unknown).values()
    key, value = mend.removeprefix("[replica] ").split(" = ")
    assert found(config | {key: float(value)}, unknown) == {"timeouts": (Level.OK, "")}
