"""What several ranks of a site hold alike travels once."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from tests.forkserver import forking
from titan_ext.replica.streams.group import StreamGroup
from titan_ext.semi_sync import SemiSync
from titan_ext.semi_sync.testing.simulator import InProcessManager

context = forking("tests.semi_sync.site.test_copies")
PATIENCE_SECONDS = 120
SITES, RANKS, SIZE, ROUNDS = 2, 2, 21, 3


class Manager(InProcessManager):
    """Of one rank, whose site is always there; its messages are real."""

    def __init__(self, site: int, rank: int, address: str) -> None:
        self._site = site
        self._process_group = StreamGroup("127.0.0.1", timedelta(seconds=60))
        self._process_group.configure(f"{address}/{rank}", "", site, SITES)

    def allreduce(self, tensor, *, reduce_op):
        return self._process_group.allreduce([tensor], reduce_op)

    def num_participants(self) -> int:
        return SITES


def rank_of_site(site: int, rank: int, port: int, folder: str, layout: str, settings: dict, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{site}", RANKS), rank=rank, world_size=RANKS)
    model = torch.nn.Linear(SIZE, 1, bias=False)
    model.weight.data.zero_()
    if layout == "sharded":
        mesh = init_device_mesh("cpu", (RANKS,))
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(1)]))
    outer = SemiSync.Config(sync_every=1, **settings).build(
        model_parts=[model], optimizers=[], manager=Manager(site, rank, f"127.0.0.1:{port}/{layout}")
    )
    outer.join()
    local = model.weight.data if layout == "copies" else model.weight.to_local().data
    generator = torch.Generator().manual_seed(site)
    for _ in range(ROUNDS):
        change = torch.randn(1, SIZE, generator=generator)
        local += change if layout == "copies" else change.tensor_split(RANKS, dim=1)[rank]
        outer.step()
    saved = outer.state_dict()["residuals"]
    residuals = [each.flatten().tolist() for rule in saved.values() for each in rule.values()]
    sha256 = outer.shared_state_sha256()
    results.put(
        (site, rank, local.flatten().tolist(), residuals if layout == "copies" else [], sha256, outer.ledger.bytes_sent)
    )
    results.close()
    results.join_thread()
    dist.barrier()
    os._exit(0)


def run(folder: str, layout: str, **settings):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    ranks = [
        context.Process(
            target=rank_of_site, args=(site, rank, store.port, folder, layout, settings, results), daemon=True
        )
        for site in range(SITES)
        for rank in range(RANKS)
    ]
    for each in ranks:
        each.start()
    found = sorted(results.get(timeout=PATIENCE_SECONDS) for _ in ranks)
    for each in ranks:
        each.join(PATIENCE_SECONDS)
    return found


@pytest.mark.parametrize("layout", ["copies", "sharded"])
def test_a_copy_of_everything_travels_once(tmp_path, layout):
    found = run(str(tmp_path), layout, method="local_sgd")
    want = torch.zeros(SIZE)
    for site in range(SITES):
        generator = torch.Generator().manual_seed(site)
        want += sum(torch.randn(1, SIZE, generator=generator)[0] for _ in range(ROUNDS)) / SITES
    for _, rank, values, _, _, sent in found:
        own = want if layout == "copies" else want.tensor_split(RANKS)[rank]
        torch.testing.assert_close(torch.tensor(values), own)
        assert sent == ROUNDS * 4 * SIZE, "of two sites each sends what it holds once"
    assert len({sha256 for *_, sha256, _ in found}) == 1


def test_copies_keep_the_same_error_feedback(tmp_path):
    found = run(str(tmp_path), "copies", method="local_sgd", codec="int8")
    values = [each[2] for each in found]
    assert all(each == values[0] for each in values)
    for site in range(SITES):
        first, second = (each[3] for each in found if each[0] == site)
        assert first == second and any(map(any, first))
