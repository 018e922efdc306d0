"""Pollen's time model (arXiv 2306.17453): t = a + b log(x) + c x, nothing negative, robust."""

import itertools
import json
import math
import random

import pytest

from titan_ext.semi_sync.plan.time_model import MeasuredTimes, TimeModel, fit

TRUE = (0.5, 0.3, 0.02)


def seconds(batches: float, of: tuple[float, float, float] = TRUE) -> float:
    constant, logarithmic, linear = of
    return constant + logarithmic * math.log(batches) + linear * batches


def observed(seed: int, count: int = 300, noise: float = 0.01, outliers: float = 0.0) -> list[tuple[int, float]]:
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        batches = generator.randint(1, 199)
        late = 20.0 if generator.random() < outliers else 0.0
        found.append((batches, seconds(batches) + generator.gauss(0, noise) + late))
    return found


def coefficients(model: TimeModel) -> tuple[float, float, float]:
    return model.constant, model.logarithmic, model.linear


@pytest.mark.parametrize("of", [TRUE, (0.0, 0.0, 0.1), (2.0, 0.0, 0.05), (0.0, 1.5, 0.0), (3.0, 0.0, 0.0)])
def test_what_follows_the_model_is_recovered(of):
    model = fit([(batches, seconds(batches, of)) for batches in (1, 2, 3, 5, 8, 20, 50)])
    assert coefficients(model) == pytest.approx(of, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_five_percent_of_outliers_change_nothing(seed):
    assert coefficients(fit(observed(seed))) == pytest.approx(TRUE, abs=0.02)
    assert coefficients(fit(observed(seed, outliers=0.05))) == pytest.approx(TRUE, abs=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_observed_more_batches_take_no_less(seed):
    generator = random.Random(seed)
    model = fit([(generator.randint(1, 30), generator.uniform(0, 5)) for _ in range(20)])
    assert min(coefficients(model)) >= 0
    predicted = [model.seconds(batches) for batches in range(100)]
    assert predicted == sorted(predicted)


def test_falling_times_are_taken_as_constant():
    """The best fit of all would have a negative slope; of those allowed the mean is best."""
    assert coefficients(fit([(1, 3.0), (2, 2.0), (3, 1.0)])) == pytest.approx((2.0, 0.0, 0.0), abs=1e-6)


def test_the_fit_is_the_best_of_a_grid_of_models_without_outliers():
    times = [(batches, seconds(batches) * (1.05 if batches % 2 else 0.95)) for batches in range(1, 40)]

    def error(of: tuple[float, float, float]) -> float:
        # As the robust loss with the scale of the fit itself sees it.
        residuals = [abs(taken - seconds(batches, of)) for batches, taken in times]
        return sum(math.atan((residual / scale) ** 2) for residual in residuals)

    model = coefficients(fit(times))
    residuals = sorted(abs(taken - seconds(batches, model)) for batches, taken in times)
    scale = 1.4826 * residuals[(len(residuals) - 1) // 2]
    steps = (-0.05, 0.0, 0.05)
    around = [
        tuple(max(0.0, value + size * step) for value, size, step in zip(model, (1, 1, 0.1), each, strict=True))
        for each in itertools.product(steps, repeat=3)
    ]
    assert error(model) <= min(error(each) for each in around) + 1e-6


def test_one_observation_means_that_every_batch_takes_as_long():
    assert coefficients(fit([(4, 2.0)])) == pytest.approx((0, 0, 0.5))
    assert fit([]) is None


@pytest.mark.parametrize(("speed", "steps"), [(1.0, 200), (0.5, 100), (0.25, 50)])
def test_steps_of_unequal_sites_in_one_box(speed, steps):
    """Speeds 1, 1/2 and 1/4: H = 200, 100 and 50."""
    assert TimeModel(linear=0.125 / speed).batches_within(25.0) == steps


@pytest.mark.parametrize("budget", [0.1, 0.52, 1.0, 7.3, 30.0])
def test_batches_within_a_time_are_the_most_that_fit(budget):
    model = TimeModel(constant=0.5, logarithmic=0.3, linear=0.02)
    fits = [batches for batches in range(2000) if model.seconds(batches) <= budget]
    assert model.batches_within(budget) == max(fits)
    assert TimeModel(constant=1.0).batches_within(2.0, most=7) == 7


def test_the_last_round_corrects_what_it_has_seen():
    times = MeasuredTimes()
    assert times.seconds(4) is None
    for batches in (1, 2, 4, 8):
        times.observe(batches, 0.5 * batches)
    times.end_round()
    times.observe(4, 3.0)  # out of line with all others: only half believed, and only for a round
    assert times.seconds(4) == pytest.approx(2.0)
    times.end_round()
    assert times.seconds(4) == pytest.approx((2.0 + 3.0) / 2)
    assert times.seconds(8) == pytest.approx(4.0)
    times.end_round()
    assert times.seconds(4) == pytest.approx(2.0)


def test_only_the_latest_observations_count():
    times = MeasuredTimes(keep=4)
    for _ in range(4):
        times.observe(2, 1.0)
    for _ in range(4):
        times.observe(2, 3.0)
    assert times.model.seconds(2) == pytest.approx(3.0)


def test_a_checkpoint_keeps_what_was_measured():
    times, again = MeasuredTimes(), MeasuredTimes()
    for batches in (1, 3, 9):
        times.observe(batches, seconds(batches))
    times.end_round()
    times.observe(3, 1.0)
    again.load_state_dict(json.loads(json.dumps(times.state_dict())))
    times.end_round()
    again.end_round()
    assert [times.seconds(each) for each in (1, 3, 20)] == [again.seconds(each) for each in (1, 3, 20)]
