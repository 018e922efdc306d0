"""What a leader makes of its ranks' parts, outside of a quorum."""

import os
import threading

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from tests.forkserver import forking
from titan_ext.semi_sync.site.leader_manager import LeaderManager
from titan_ext.semi_sync.site.shards import SiteShards

context = forking("tests.semi_sync.site.test_leader_manager")
PATIENCE_SECONDS = 120
RANKS = 2
WHOLE = torch.arange(10.0).view(5, 2)


class Leading:
    """A leader's replica that wants a copy whenever it is told to."""

    def __init__(self):
        self.wanted = False
        self.copies = []
        self.states = {}

    def register_state_dict_fn(self, key, load_state_dict, state_dict):
        self.states[key] = state_dict

    def state_dict(self):
        return {"step": 7, "batches_committed": 14}

    def serve_snapshot_requests(self, make):
        if self.wanted:
            self.copies.append(make())


def rank_of_site(rank, store, results):
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    sharded = distribute_tensor(WHOLE, mesh, [Shard(0)])
    shards = SiteShards({"weight": sharded})
    leading = Leading() if rank == 0 else None
    manager = LeaderManager(leading, shards)
    manager.register_state_dict_fn(
        "outer",
        lambda state: None,
        lambda: {"step": 3, "states": {"params": {"weight": {"global": sharded.to_local()}}}},
    )
    manager.serve_snapshot_requests()
    if rank == 0:
        leading.wanted = True
    # A round in flight has its own thread, whose messages between the ranks must not mix with those of the copy.
    shared = []
    numbers = range(200) if rank == 0 else [None] * 200
    flight = threading.Thread(target=lambda: shared.extend(map(shards.share, numbers)))
    flight.start()
    for _ in range(20):
        manager.serve_snapshot_requests()
    flight.join()
    whole = [copy["user"]["outer"] for copy in leading.copies] if leading else []
    results.put(
        (
            rank,
            shared == list(range(200)),
            [(state["step"], state["states"]["params"]["weight"]["global"].tolist()) for state in whole],
            [copy["torchft"] for copy in leading.copies] if leading else [],
        )
    )
    results.close()
    results.join_thread()
    dist.barrier()
    os._exit(0)


def test_a_newcomers_copy_is_of_the_whole_site(tmp_path):
    results = context.Queue()
    ranks = [
        context.Process(target=rank_of_site, args=(rank, str(tmp_path / "store"), results), daemon=True)
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    found = {rank: rest for rank, *rest in (results.get(timeout=PATIENCE_SECONDS) for _ in ranks)}
    for process in ranks:
        process.join(PATIENCE_SECONDS)
    assert found[0][0] and found[1][0], "messages of the flight and of the copy were mixed up"
    assert found[0][1] == [(3, WHOLE.tolist())] * 20
    assert found[0][2] == [{"step": 7, "batches_committed": 14}] * 20
