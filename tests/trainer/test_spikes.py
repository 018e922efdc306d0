"""Spikes against a window written out in plain loops."""

import math
import random
import statistics

import pytest

from titan_ext.errors import UserError
from titan_ext.trainer.spikes import SpikeDetector, SpikesConfig


def reference(values: list[float], window: int, deviations: float) -> list[bool]:
    seen: list[float] = []
    found = []
    for value in values:
        last = seen[-window:]
        limit = math.inf
        if len(last) >= window // 2:
            limit = statistics.fmean(last) + deviations * statistics.stdev(last)
        found.append(not value <= limit or math.isinf(value))
        if math.isfinite(value):
            seen.append(min(value, limit))
    return found


@pytest.mark.parametrize("signal", ["loss", "grad_norm"])
def test_a_value_far_above_those_before_stands_out(signal: str) -> None:
    random.seed(0)
    values = [3 + random.gauss(0, 0.1) for _ in range(60)]
    values[3] = 50.0  # before there is anything to judge by
    values[30], values[31], values[45], values[50] = 9.0, math.nan, math.inf, 3.1
    values += [6.0] * 30  # a level that stays is let in
    detector = SpikeDetector(SpikesConfig(action="skip", window=16, deviations=4.0))
    found = []
    for value in values:
        arguments = {"loss": 1.0, "grad_norm": 1.0} | {signal: value}
        found.append(detector.judge(**arguments) is not None)
    expected = reference(values, 16, 4.0)
    assert found == expected
    assert found[30] and found[31] and found[45] and not found[3] and not found[50] and not found[-1]


def test_clipping_goes_by_the_norm_alone() -> None:
    detector = SpikeDetector(SpikesConfig(action="clip", window=4, deviations=1.0))
    for norm in (1.0, 2.0, 1.0, 2.0):
        assert detector.judge(100.0 * norm, norm) is None or norm == 2.0
    spike = detector.judge(1e9, 5.0)
    assert spike is not None and set(spike.limits) == {"grad_norm"} and 1.5 < spike.limits["grad_norm"] < 5


def test_a_restored_window_judges_as_the_one_that_was_saved() -> None:
    config = SpikesConfig(action="skip", window=6, deviations=2.0)
    first, second = SpikeDetector(config), SpikeDetector(config)
    for step in range(5):
        first.judge(float(step), 1.0)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for step in range(5, 12):
        assert first.judge(float(step % 7), 1.0 + step) == second.judge(float(step % 7), 1.0 + step)


@pytest.mark.parametrize("settings", [{"window": 3}, {"deviations": 0.0}, {"deviations": math.inf}])
def test_settings_out_of_range_are_named(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        SpikesConfig(**settings)
