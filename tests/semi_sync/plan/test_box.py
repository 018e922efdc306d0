"""The steps of unequal sites in one round."""

import itertools
import random

import pytest

from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.plan.box import Box, Pace
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.plan.time_model import TimeModel


def pace(seconds: float, tokens: float = 1.0, constant: float = 0.0) -> Pace:
    return Pace(TimeModel(constant=constant, linear=seconds), tokens)


def test_the_steps_follow_the_speeds():
    """Speeds 1, 1/2 and 1/4: H = 200, 100 and 50 (DyLU)."""
    sites = [pace(0.125), pace(0.25), pace(0.5)]
    assert Box(kind="speed", steps=200).budgets(sites).steps == [200, 100, 50]
    assert Box(kind="steps", steps=200).budgets(sites).steps == [200, 200, 200]
    assert Box(kind="seconds", steps=200, size=12.5).budgets(sites).steps == [100, 50, 25]


@pytest.mark.parametrize("seed", range(5))
def test_dylu_is_the_floor_of_the_proportion_of_speeds(seed):
    generator = random.Random(seed)
    speeds = [generator.randint(1, 50) for _ in range(5)]
    found = Box(kind="speed", steps=64).budgets([pace(1 / speed) for speed in speeds]).steps
    expected = [max(1, speed * 64 // max(speeds)) for speed in speeds]
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), "floor, but for rounding"
    assert sum(found) >= sum(expected) - 1


def test_a_constant_part_of_the_time_counts():
    """10 steps of 1 s in 10 s; a site that needs 4 s before its first step of 2 s takes 3."""
    assert Box(kind="speed", steps=10).budgets([pace(1.0), pace(2.0, constant=4.0)]).steps == [10, 3]


def test_tokens_fill_the_box():
    sites = [pace(1.0, tokens=100), pace(1.0, tokens=30), pace(1.0, tokens=1), Pace()]
    assert Box(kind="tokens", steps=50, size=300).budgets(sites).steps == [3, 10, 50, 50]
    assert Box(kind="tokens", steps=50, size=301).budgets(sites).steps == [4, 11, 50, 50]


def test_every_site_takes_a_step_and_those_of_unknown_speed_all():
    found = Box(kind="speed", steps=8).budgets([pace(0.1), pace(100.0), Pace()])
    assert found.steps == [8, 1, 8]
    assert found.seconds == pytest.approx(0.8), "after which the unknown one ends its part"
    assert Box(kind="speed", steps=8).budgets([Pace(), Pace()]).steps == [8, 8]


def test_the_grace_lets_a_step_in_that_would_just_not_fit():
    """A box of 8 s and a site whose step takes 3 s: 2 steps in 8 s, or 3 in 9."""
    sites = [pace(1.0, tokens=1), pace(3.0, tokens=3)]
    assert Box(kind="speed", steps=8).budgets(sites).steps == [8, 2]
    assert Box(kind="speed", steps=8, grace=0.1).budgets(sites).steps == [8, 2], "9 s is beyond 8.8"
    found = Box(kind="speed", steps=8, grace=0.2).budgets(sites)
    assert found.steps == [8, 3], "17 tokens in 9 s are more than 14 in 8"
    assert found.seconds == pytest.approx(9.6)
    light = [pace(1.0, tokens=100), pace(3.0, tokens=1)]
    assert Box(kind="speed", steps=8, grace=0.2).budgets(light).steps == [8, 2], "not for a step that adds little"


@pytest.mark.parametrize("seed", range(8))
def test_no_end_within_the_grace_makes_more_tokens_a_second(seed):
    generator = random.Random(seed)
    sites = [pace(generator.uniform(0.5, 3), generator.randint(1, 9), generator.uniform(0, 1)) for _ in range(3)]
    box = Box(kind="speed", steps=6, grace=0.3)
    found = box.budgets(sites).steps
    time = min(site.times.seconds(6) for site in sites)

    def rate(steps: tuple[int, ...]) -> float:
        return sum(n * s.step_tokens for n, s in zip(steps, sites)) / max(
            s.times.seconds(n) for n, s in zip(steps, sites)
        )

    allowed = [
        steps
        for steps in itertools.product(range(1, 7), repeat=3)
        if all(n == 1 or s.times.seconds(n) <= time * 1.3 for n, s in zip(steps, sites))
        # those in the time itself are never given up
        and all(n >= min(6, s.times.batches_within(time)) for n, s in zip(steps, sites))
    ]
    assert rate(tuple(found)) >= max(map(rate, allowed)) - 1e-9


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(round_box="time"), "round_box = 'time': must be one of"),
        (dict(round_box="seconds"), "round_box_size = None: must be above 0"),
        (dict(round_box="tokens", round_box_size=-1.0), "round_box_size = -1.0: must be above 0"),
        (dict(round_box="speed", round_box_size=3.0), "round_box_size = 3.0: must be left out"),
        (dict(round_box_grace=2.0), "round_box_grace = 2.0: must be from 0 to 1"),
        (
            dict(round_box="speed", sync_every=4, num_fragments=2),
            "round_box = 'speed': must be \"steps\" with fragments",
        ),
        (dict(round_box="speed", method="sparta"), "round_box = 'speed': must be \"steps\" with method"),
        (
            dict(round_box="speed", aggregation="median"),
            'aggregation = \'median\': must be "mean" with weighting = "tokens"',
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        resolve(SemiSyncConfig(**settings))


def test_a_box_weighs_by_tokens_unless_told_otherwise():
    weights = [resolve(SemiSyncConfig(**each)).weighting for each in (dict(), dict(round_box="speed"))]
    assert [type(each).__name__ for each in weights] == ["Uniform", "ByTokens"]
    assert type(resolve(SemiSyncConfig(round_box="speed", weighting="uniform")).weighting).__name__ == "Uniform"
