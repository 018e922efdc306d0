"""Pollen's placement: its vectors, its bound, and that every source is placed once."""

import itertools
import random

import pytest

from titan_ext.semi_sync.plan.time_model import MeasuredTimes
from titan_ext.semi_sync.sources.placement import Worker, longest_first, makespan, place, round_robin


def linear(name, seconds, **more):
    return Worker(name, lambda batches: seconds * batches, **more)


def test_the_published_example():
    """Workers of 0.1 and 0.2 seconds a batch, sources of 10, 8, 6, 4 and 2 batches: both are busy for 2 seconds."""
    sizes, workers = [10, 8, 6, 4, 2], [linear("fast", 0.1), linear("slow", 0.2)]
    placed = longest_first(sizes, workers)
    assert [[sizes[each] for each in indices] for indices in placed] == [[10, 6, 4], [8, 2]]
    assert makespan(sizes, workers, placed) == pytest.approx(2.0)
    assert longest_first(sizes, workers[::-1]) == placed[::-1], "fast ones come first, wherever they stand"


def test_unequal_machines_end_together():
    """100 sources of 1 to 199 batches, two workers of either of two kinds, times of a + b log x + c x seconds."""
    from math import log

    def worker(name, a, b, c):
        return Worker(name, lambda x: a + b * log(x) + c * x)

    kinds = [("f0", 0.5, 0.3, 0.02), ("f1", 0.5, 0.3, 0.02), ("s0", 1.0, 0.6, 0.05), ("s1", 1.0, 0.6, 0.05)]
    workers = [worker(*kind) for kind in kinds]
    draw = random.Random(0)
    sizes = [draw.randint(1, 199) for _ in range(100)]
    longest, dealt = longest_first(sizes, workers), round_robin(sizes, workers)
    assert makespan(sizes, workers, dealt) > 1.5 * makespan(sizes, workers, longest)
    loads = [sum(worker.seconds(sizes[each]) for each in indices) for worker, indices in zip(workers, longest)]
    assert 1 - sum(loads) / (4 * max(loads)) < 0.02, "idle"


@pytest.mark.parametrize("seed", range(20))
def test_equal_workers_are_within_the_bound_of_the_best_placement(seed):
    """Graham's bound for longest first: 4/3 - 1/(3 m) of the optimum, which trying all placements finds."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 20) for _ in range(7)]
    workers = [linear(str(each), 1.0) for each in range(3)]
    best = min(
        max(sum(size for size, at in zip(sizes, where) if at == worker) for worker in range(3))
        for where in itertools.product(range(3), repeat=len(sizes))
    )
    assert best <= makespan(sizes, workers, longest_first(sizes, workers)) <= (4 / 3 - 1 / 9) * best + 1e-9


@pytest.mark.parametrize("count", [1, 3, 4, 9, 50])
@pytest.mark.parametrize("known", [True, False])
def test_every_source_is_placed_once_and_equal_ones_evenly(count, known):
    workers = [linear(str(each), 1.0) if known else Worker(str(each)) for each in range(4)]
    placed = place([5] * count, workers)
    assert sorted(each for indices in placed for each in indices) == list(range(count))
    loads = [len(indices) for indices in placed]
    assert max(loads) - min(loads) <= 1


def test_until_all_times_are_known_sources_are_dealt_in_turn():
    workers = [linear("a", 1.0), Worker("b")]
    assert place([1, 9, 5, 7], workers) == [[0, 2], [1, 3]]


def test_the_sources_of_a_worker_that_left_are_placed_with_the_others():
    workers = [linear("a", 1.0), linear("b", 2.0), linear("c", 3.0)]
    without = place([4, 3, 2, 1], workers[:2])
    assert sorted(each for indices in without for each in indices) == [0, 1, 2, 3]
    assert place([4, 3, 2, 1], workers) != without


def test_a_worker_with_two_lanes_takes_two_sources_at_a_time():
    placed = longest_first([4, 4, 4], [linear("two", 1.0, concurrency=2), linear("one", 1.0)])
    assert sorted(map(len, placed)) == [1, 2]


def test_times_are_learned_while_it_runs():
    """What a worker has taken places the next round; a round that took longer than the model says corrects it."""
    fast, slow = MeasuredTimes(), MeasuredTimes()
    workers = [Worker("fast", fast.seconds), Worker("slow", slow.seconds)]
    assert place([10, 8, 6, 4, 2], workers) == [[0, 2, 4], [1, 3]]
    for batches in (2, 5, 9):
        fast.observe(batches, 0.1 * batches)
        slow.observe(batches, 0.2 * batches)
    assert place([10, 8, 6, 4, 2], workers) == [[0, 2, 3], [1, 4]]


def test_no_worker_and_no_lane_are_refused():
    with pytest.raises(ValueError, match="workers = 0"):
        place([1], [])
    with pytest.raises(ValueError, match="concurrency of a = 0"):
        place([1], [linear("a", 1.0, concurrency=0)])
