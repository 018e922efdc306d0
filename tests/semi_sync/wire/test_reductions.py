"""Sums over sites of one process: every number of sites, buckets of every size."""

import pytest
import torch

from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.codecs import CODECS
from titan_ext.semi_sync.wire.coded_reductions import CodedReduction
from titan_ext.semi_sync.wire.collectives import Traffic
from titan_ext.semi_sync.wire.gossip import PairExchange
from titan_ext.semi_sync.wire.reductions import UNDER_WAY, AllReduce, Buckets, Reduction, RoundFacts


def reduced(reductions: list[Reduction], values: torch.Tensor) -> list[torch.Tensor]:
    """What each site has after the sum of ``values [sites, numel]``."""
    sites = InProcessSites(len(values))
    managers, out = sites.managers(), [row.clone() for row in values]
    facts = RoundFacts(3, [1.0] * len(values))
    sites.at_once(lambda site: reductions[site].reduce(managers[site], out[site], facts))
    sites.close()
    return out


@pytest.mark.parametrize("sites", [1, 2, 3, 5])
@pytest.mark.parametrize(("numel", "bucket"), [(0, 4), (1, 4), (1000, 1), (1003, 64), (1003, 5000)])
def test_plain_sums_are_exact_and_counted(sites: int, numel: int, bucket: int) -> None:
    values = torch.randint(-1000, 1000, (sites, numel), generator=torch.Generator().manual_seed(0)).float()
    reductions = [AllReduce(bucket) for _ in range(sites)]
    for out in reduced(reductions, values):
        assert torch.equal(out, values.sum(0))
    traffic = [each.take_traffic() for each in reductions]
    assert sum(each.sent for each in traffic) == sum(each.received for each in traffic) == 2 * (sites - 1) * 4 * numel
    assert [each.take_traffic() for each in reductions] == [Traffic()] * sites, "they were taken"


@pytest.mark.parametrize("name", list(CODECS))
def test_two_sites_hold_the_same_sum_of_what_each_could_read(name: str) -> None:
    codec, values = CODECS.get(name)(), torch.randn(2, 9000, generator=torch.Generator().manual_seed(1))
    found = reduced([CodedReduction(codec, 3000) for _ in range(2)], values)
    assert torch.equal(found[0], found[1])
    unit = codec.granularity
    bucket = -(-3000 // unit) * unit
    for start in range(0, 9000, bucket):
        own = values[:, start : start + bucket]
        want = torch.zeros(-(-own.shape[1] // unit) * unit)
        for row in own:
            padded = torch.zeros_like(want)
            padded[: len(row)] = row
            message = torch.empty(codec.wire_bytes(len(want)), dtype=torch.uint8)
            codec.encode(padded, message)
            decoded = torch.empty_like(want)
            codec.decode(message, decoded)
            want += decoded
        assert torch.equal(found[0][start : start + bucket], want[: own.shape[1]])


def test_a_pair_has_the_sum_of_both() -> None:
    values = torch.arange(2000.0).view(2, 1000)
    for out in reduced([PairExchange(17), PairExchange(17)], values):
        assert torch.equal(out, values.sum(0))


@pytest.mark.parametrize("unit", [1, 256, 768])
@pytest.mark.parametrize("most", [1, 1000, 2**23])
def test_no_more_is_under_way_than_two_of_the_largest_buckets(most: int, unit: int) -> None:
    for numel in (1, 10**5, 10**7, 10**9):
        buckets = Buckets.of(numel, most, unit)
        assert buckets.elements % unit == 0 and buckets.elements < most + unit
        assert buckets.elements * buckets.at_most <= UNDER_WAY * max(most, buckets.elements)
        assert buckets.at_most >= UNDER_WAY
        assert buckets.under_way(numel) <= numel
