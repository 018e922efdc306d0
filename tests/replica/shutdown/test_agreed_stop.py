"""Ranks that stop at one count, wherever they were."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import DistError, HashStore

from titan_ext.replica.shutdown.agreed_stop import AgreedStop

LONG = timedelta(seconds=30)


def ranks_at(counts: list[int]) -> list[AgreedStop]:
    """A count for each rank, advanced as often as given."""
    store = HashStore()
    ranks = [AgreedStop(store, "steps", rank, len(counts)) for rank in range(len(counts))]
    for each, count in zip(ranks, counts, strict=True):
        assert all(each.advance() for _ in range(count))
    return ranks


def close(ranks: list[AgreedStop]) -> list[int]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [closed.result() for closed in [pool.submit(each.close, LONG) for each in ranks]]


@pytest.mark.parametrize("counts", [[0], [3], [2, 2], [0, 4], [5, 1, 3]])
def test_every_rank_goes_on_to_the_highest_count_and_no_further(counts):
    ranks = ranks_at(counts)
    assert close(ranks) == [max(counts)] * len(counts)
    for each, count in zip(ranks, counts, strict=True):
        assert sum(each.advance() for _ in range(10)) == max(counts) - count


def test_a_rank_that_counts_while_the_others_have_not_closed_waits_for_them():
    first, second = ranks_at([1, 3])
    with ThreadPoolExecutor(2) as pool:
        closing = pool.submit(first.close, LONG)
        while not first._closed:
            pass
        advancing = pool.submit(first.advance)
        assert second.advance()
        assert not closing.done() and not advancing.done()
        assert second.close(LONG) == closing.result() == 4
        assert advancing.result()
    assert [first.advance() for _ in range(3)] == [True, True, False]


def test_a_rank_that_never_closes_is_an_error():
    first, _ = ranks_at([1, 1])
    with pytest.raises(DistError):
        first.close(timedelta(milliseconds=50))
    assert not first.agreed.done()


def test_counts_of_other_names_are_apart():
    store = HashStore()
    steps, quorums = (AgreedStop(store, name, 0, 1) for name in ("steps", "quorums"))
    assert steps.advance()
    assert (steps.close(LONG), quorums.close(LONG)) == (1, 0)
