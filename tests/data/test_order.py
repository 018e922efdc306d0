"""Shares, shards and splits take every document once; orders are permutations that never change."""

import itertools

import numpy as np
import pytest

from titan_ext.data.corpora.corpus import Corpus
from titan_ext.data.feed import CorpusFeed, Selection
from titan_ext.data.order import epoch_order, mix, share, split_documents


class Numbers:
    """Documents that are their own numbers, in units of some size."""

    def __init__(self, count: int, unit: int | None = None) -> None:
        self.count, self.unit, self.size = count, unit, count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> str:
        return str(index)

    sources = ("numbers",)

    def source(self, index: int) -> int:
        return 0

    def units(self) -> np.ndarray | None:
        return None if self.unit is None else np.arange(self.count) // self.unit


def selection(**changes: object) -> Selection:
    settings = dict(
        seed=1, shuffle=True, shuffle_buffer=4, split="all", holdout_fraction=0.0, share_index=0, share_count=1
    )
    return Selection(**(settings | changes))


def read(feed: CorpusFeed, epoch: int, shard: int, shards: int) -> list[int]:
    return [int(document.text) for document in feed.read(epoch, None, shard, shards)]


@pytest.mark.parametrize("count", [1, 7, 24, 101])
@pytest.mark.parametrize("sites", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("unit", [None, 4])
def test_sites_and_ranks_take_every_document_once(count: int, sites: int, ranks: int, unit: int | None) -> None:
    corpus = Corpus("numbers", [Numbers(count, unit)])
    for epoch in (0, 3):
        taken = []
        for site in range(sites):
            feed = CorpusFeed(corpus, selection(share_index=site, share_count=sites, seed=site))
            parts = [read(feed, epoch, rank, ranks) for rank in range(ranks)]
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert sorted(itertools.chain(*parts)) == feed.documents.tolist()
            taken += itertools.chain(*parts)
        assert sorted(taken) == list(range(count))


def test_a_sites_share_is_the_same_in_every_epoch() -> None:
    feed = CorpusFeed(Corpus("numbers", [Numbers(50)]), selection(share_index=1, share_count=2))
    first, second = read(feed, 0, 0, 1), read(feed, 1, 0, 1)
    assert first != second and sorted(first) == sorted(second) == list(range(1, 50, 2))


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    corpus = Corpus("numbers", [Numbers(50)])
    orders = {
        (seed, epoch): tuple(read(CorpusFeed(corpus, selection(seed=seed)), epoch, 0, 1))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert orders[1, 0] == tuple(read(CorpusFeed(corpus, selection(seed=1)), 0, 0, 1))
    assert read(CorpusFeed(corpus, selection(shuffle=False)), 3, 0, 1) == list(range(50))


def test_the_mixing_function_never_changes() -> None:
    numbers = mix(np.arange(3), 1, 2)
    assert numbers.dtype == np.uint64
    assert [int(number) for number in numbers] == [13176928344699773657, 1645554592445360551, 16297724838520038581]


def test_the_mixing_function_spreads_evenly() -> None:
    positions = np.argsort(mix(np.arange(4000), 5))
    assert abs(np.corrcoef(np.arange(4000), positions)[0, 1]) < 0.05
    bits = (mix(np.arange(4000), 5)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 0.05)


def test_units_are_read_together_within_a_window() -> None:
    units = np.arange(200) // 10
    order = epoch_order(np.arange(200), units, seed=3, epoch=0, window=30)
    assert sorted(order.tolist()) == list(range(200))
    windows = [order[start : start + 30] for start in range(0, 200, 30)]
    assert all(len(set((window // 10).tolist())) == len(window) // 10 for window in windows)
    assert windows[0].tolist() != sorted(windows[0].tolist())
    assert [window[0] // 10 for window in windows] != sorted(window[0] // 10 for window in windows)


@pytest.mark.parametrize("count", [1, 9, 100])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_splits_are_disjoint_and_cover(count: int, fraction: float) -> None:
    train = split_documents(count, "train", fraction)
    held = split_documents(count, "validation", fraction)
    assert len(held) == -(-count * fraction // 1) and len(held) >= 1
    assert sorted([*train, *held]) == list(range(count)) == split_documents(count, "all", fraction).tolist()


def test_no_site_trains_on_what_another_validates_on() -> None:
    def of(split: str) -> set[int]:
        chosen = split_documents(100, split, 0.2)
        return set(itertools.chain(*(share(chosen, site, 3).tolist() for site in range(3))))

    assert not of("train") & of("validation") and len(of("validation")) == 20
