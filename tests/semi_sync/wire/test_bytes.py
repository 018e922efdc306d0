"""The ledger's bytes, against bytes that are counted where they are handed to the wire."""

import pytest
import torch

from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.testing import InProcessSites
from titan_ext.semi_sync.wire.codecs import CODECS
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes


def counted_ring(payload: int, sites: int) -> int:
    """What the site that sends most sends in a ring all-reduce, message by message.

    The payload is cut into as many chunks as there are sites. In each of ``sites - 1`` turns every site passes one
    chunk to the next, which adds it to its own; in as many turns more the finished sums go round.
    """
    chunks = [payload // sites + (place < payload % sites) for place in range(sites)]
    sent = [0] * sites
    for turn in range(2 * (sites - 1)):
        for site in range(sites):
            sent[site] += chunks[(site - turn) % sites]
    return max(sent)


@pytest.mark.parametrize("sites", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("payload", [0, 120, 4 * 30030])
def test_a_ring_sends_what_its_messages_come_to(payload, sites):
    assert payload % sites == 0
    assert ring_all_reduce_bytes(payload, sites) == counted_ring(payload, sites)


@pytest.mark.parametrize("sites", [3, 7])
def test_chunks_of_unequal_size_differ_by_less_than_a_chunks_rest(sites):
    assert abs(ring_all_reduce_bytes(1000, sites) - counted_ring(1000, sites)) <= 2 * (sites - 1)


class Counter:
    """Stands before a site's process group and counts the bytes that go to other sites and come from them."""

    def __init__(self, group: object) -> None:
        self._group, self.sent, self.received = group, 0, 0

    def getBackendName(self) -> str:
        return self._group.getBackendName()

    def send(self, tensors, dst_rank, tag):
        self.sent += tensors[0].nbytes
        return self._group.send(tensors, dst_rank, tag)

    def recv(self, tensors, src_rank, tag):
        self.received += tensors[0].nbytes
        return self._group.recv(tensors, src_rank, tag)


@pytest.mark.parametrize("sites", [2, 3])
@pytest.mark.parametrize("numel", [5, 3000])
@pytest.mark.parametrize(
    ("codec", "aggregation"), [*((name, "mean") for name in CODECS), ("fp32", "median"), ("int8", "median")]
)
def test_the_ledger_has_the_bytes_that_travel(codec, aggregation, numel, sites):
    simulated = InProcessSites(sites)
    managers = simulated.managers()
    counters = [Counter(manager.process_group) for manager in managers]
    for manager, counter in zip(managers, counters):
        manager._process_group = counter
    simulated.managers = lambda: managers
    models = [torch.nn.Linear(numel, 1, bias=False) for _ in range(sites)]
    for model in models:
        model.weight.data.zero_()
    config = SemiSyncConfig(method="local_sgd", sync_every=1, codec=codec, aggregation=aggregation, bucket_mib=0.004)
    outer = simulated.outer_loops(config, models)
    assert [counter.sent for counter in counters] == [0] * sites, "joining sends no values"
    for _ in range(2):
        for model in models:
            model.weight.data += torch.randn(1, numel)
        simulated.at_once(lambda site: outer[site].step())
    assert [loop.ledger.bytes_sent for loop in outer] == [counter.sent for counter in counters]
    assert [loop.ledger.bytes_received for loop in outer] == [counter.received for counter in counters]
    assert counters[0].sent > 0
    simulated.close()
