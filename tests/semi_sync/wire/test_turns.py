"""What the cost model knows of how messages wait for each other, against the messages of a reduction."""

from collections import Counter

import pytest
import torch

from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.codecs import CODECS
from titan_ext.semi_sync.wire.coded_reductions import CodedReduction, ElementwiseReduction
from titan_ext.semi_sync.wire.gossip import PairExchange
from titan_ext.semi_sync.wire.nonzero import NonzeroSum
from titan_ext.semi_sync.wire.reductions import AllReduce, Reduction, RoundFacts
from titan_ext.semi_sync.wire.sparse_reductions import SparseReduction
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap

BUCKET = 1024
REDUCTIONS = {
    "fp32": AllReduce(BUCKET),
    "int8": CodedReduction(CODECS.get("int8")(), BUCKET),
    "topk": CodedReduction(CODECS.get("topk")(), BUCKET),
    "median": ElementwiseReduction(CODECS.get("fp32")(), BUCKET, lambda values: values.median(dim=0).values),
    "nonzero": NonzeroSum(BUCKET),
    "pairs": PairExchange(BUCKET),
}


class CountedGroup:
    """Stands before a site's process group and counts the messages that go to each other site."""

    def __init__(self, group: object) -> None:
        self._group, self.to = group, Counter()

    def getBackendName(self) -> str:
        return self._group.getBackendName()

    def send(self, tensors, dst_rank, tag):
        self.to[dst_rank] += 1
        return self._group.send(tensors, dst_rank, tag)

    def recv(self, tensors, src_rank, tag):
        return self._group.recv(tensors, src_rank, tag)


def messages_of(reductions: list[Reduction], numel: int) -> Counter:
    """How many messages the first site sends to each other one."""
    sites = InProcessSites(len(reductions))
    managers = sites.managers()
    for manager in managers:
        manager._process_group = CountedGroup(manager.process_group)
    of = RoundFacts(step=4, weights=[1.0] * len(reductions))
    sites.at_once(lambda site: reductions[site].reduce(managers[site], torch.ones(numel), of))
    sites.close()
    return managers[0].process_group.to


def check(reductions: list[Reduction], numel: int) -> None:
    turns = reductions[0].turns(numel, len(reductions))
    to = messages_of(reductions, numel)
    assert set(to.values()) == {turns.before + turns.buckets * turns.hops} and len(to) == turns.peers


@pytest.mark.parametrize("sites", [2, 3, 4])
@pytest.mark.parametrize("numel", [1000, 12 * 1024])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_messages_of_a_reduction(name: str, numel: int, sites: int) -> None:
    if name != "pairs" or sites != 3:  # of three, one is left over
        check([REDUCTIONS[name]] * sites, numel)


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("rows", [24, 2000])
def test_messages_of_rows(rows: int, sites: int) -> None:
    reductions = [SparseReduction(TokenRowMap.all(rows), 4, CODECS.get("fp32")(), BUCKET) for _ in range(sites)]
    check(reductions, 4 * rows)
