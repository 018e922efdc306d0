"""The batch over the first steps."""

import pytest

from titan_ext.trainer.batch_warmup import BatchWarmupConfig, passes_at


@pytest.mark.parametrize(
    ("start", "expected"), [(0, [1, 1, 2, 3, 4, 4]), (8, [2, 2, 3, 3, 4, 4]), (16, [4, 4, 4, 4, 4, 4])]
)
def test_the_batch_grows_evenly_by_whole_passes(start: int, expected: list[int]) -> None:
    config = BatchWarmupConfig(steps=4, start_batch_size=start)
    assert [passes_at(step, config, full=4, sequences=4) for step in range(1, 7)] == expected


def test_without_a_warm_up_the_batch_is_whole() -> None:
    assert [passes_at(step, BatchWarmupConfig(), full=3, sequences=2) for step in (1, 2, 100)] == [3, 3, 3]
